"""What tools of the Model Context Protocol say of files: Gradio promises to fetch links, and this app fetches none."""

from studio.errors import StudioError

FILE = "the file itself, as data:image/png;base64,... text; neither links nor paths are read"
_PROMISED = "Gradio File Input"


def describe_files(server):
    """Let the tools of a Gradio MCP server (`None` where there is none) say how a file is given, and take no other."""
    if server is None:
        return
    describe, convert = server.get_input_schema, server.convert_strings_to_filedata

    def described(*args, **settings):
        schema, places = describe(*args, **settings)
        for value in schema.get("properties", {}).values():
            if str(value.get("format", "")).startswith(_PROMISED):
                value["format"] = FILE
        return schema, places

    def converted(value, places):
        for place in places:
            given = value.get(place[0]) if place else None
            if isinstance(given, str) and not given.startswith("data:"):
                raise StudioError(f"Give {FILE}.")
        return convert(value, places)

    server.get_input_schema, server.convert_strings_to_filedata = described, converted
