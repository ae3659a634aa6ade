"""Assertions about a refused command line."""


def assert_refused(result, *expected: str) -> None:
    status, out, err = result
    lines = err.splitlines()
    assert (status, out) == (2, "")
    assert lines[-1].startswith("error: ") and sum(line.startswith("error") for line in lines) == 1
    # besides the error at most the lines that say what is being loaded, and what a folder holds besides pictures
    assert all(line.startswith(("error: ", "loading ")) or ": left out " in line for line in lines), err
    for text in expected:
        assert text in lines[-1]
