"""How tools of the Model Context Protocol take files: as data, since this app fetches no links.

Gradio's own descriptions say that links are fetched.
"""

from typing import Any

from studio.errors import StudioError

FILE = "the file itself, as data:image/png;base64,... text; neither links nor paths are read"
_PROMISED = "Gradio File Input"


def describe_files(server: Any) -> None:
    """Describe and check how the tools of a Gradio MCP server take files; `None` where there is no server."""
    if server is None:
        return
    describe, convert = server.get_input_schema, server.convert_strings_to_filedata

    def described(*args: Any, **settings: Any) -> Any:
        schema, places = describe(*args, **settings)
        for value in schema.get("properties", {}).values():
            if str(value.get("format", "")).startswith(_PROMISED):
                value["format"] = FILE
        return schema, places

    def converted(value: dict[str, Any], places: list[list[Any]]) -> Any:
        for place in places:
            given = value.get(place[0]) if place else None
            if isinstance(given, str) and not given.startswith("data:"):
                raise StudioError(f"Give {FILE}.")
        return convert(value, places)

    server.get_input_schema, server.convert_strings_to_filedata = described, converted
