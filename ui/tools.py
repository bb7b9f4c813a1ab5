"""What tools of the Model Context Protocol say of files: Gradio promises to fetch links, and this app fetches none."""

FILE = "the file itself, as data:image/png;base64,... text; neither links nor paths are read"
_PROMISED = "Gradio File Input"


def describe_files(server):
    """Let the tools of a Gradio MCP server (`None` where there is none) say how a file is given."""
    if server is None:
        return
    describe = server.get_input_schema

    def described(*args, **settings):
        schema, places = describe(*args, **settings)
        for value in schema.get("properties", {}).values():
            if str(value.get("format", "")).startswith(_PROMISED):
                value["format"] = FILE
        return schema, places

    server.get_input_schema = described
