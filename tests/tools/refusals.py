"""Assertions about a refused command line."""


def assert_refused(result, *expected: str) -> None:
    status, out, err = result
    lines = err.splitlines()
    assert (status, out) == (2, "")
    assert lines[-1].startswith("error: ") and sum(line.startswith("error") for line in lines) == 1
    # besides the error at most the line that says what is being loaded
    assert all(line.startswith(("error: ", "loading ")) for line in lines), err
    for text in expected:
        assert text in lines[-1]
