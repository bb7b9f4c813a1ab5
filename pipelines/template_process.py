"""Renders chat templates in a process of its own, as `studio.pipelines.chat_template` asks; run as a script.

It reads lines of JSON and answers each with one: first the import path and the limit of memory in bytes, then a
`{"template", "values"}` each, answered by `{"text"}` or `{"error"}`. The environment is that of transformers
(`transformers.utils.chat_template_utils`), without what a prompt does not need. Nothing of Studio is imported.
"""

import datetime
import json
import sys
from functools import cache
from typing import Any

MAX_CHARACTERS = 1 << 20


def main() -> None:
    """Answer requests until the input ends."""
    start = json.loads(sys.stdin.readline())
    sys.path[:] = start["path"]
    from jinja2.exceptions import TemplateError, TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """Renders what stands between `{% generation %}` and `{% endgeneration %}`."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class TemplateNamespace(Namespace):
        """A namespace without private names."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise TemplateError(f"a namespace has no {name!r}")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "namespace": TemplateNamespace,
    }
    compiled = cache(environment.from_string)
    _limit_memory(start["bytes"])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            text = compiled(request["template"]).render(request["values"])
            answer = {"text": text} if len(text) <= MAX_CHARACTERS else {"error": "it makes a text without end"}
        except MemoryError:
            answer = {"error": "it needs too much memory"}
        except TemplateSyntaxError as error:
            answer = {"error": f"line {error.lineno}: {error.message}"}
        except Exception as error:  # a template may call anything that the sandbox has
            answer = {"error": str(error) or type(error).__name__}
        print(json.dumps(answer), flush=True)


def _limit_memory(limit: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
