"""What tests of the command line ask of a result."""


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(result, *words):
    """Check for exit code 2 and one sentence on stderr that contains the words."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert code == 2, err
    assert out == "" and len(lines) == 1 and err.rstrip().endswith(lines[0]) and "Traceback" not in err
    for word in words:
        assert word in lines[0]
