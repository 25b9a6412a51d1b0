from components.rlhf.text.errors import InputError


def test_message_is_one_line_without_control_characters() -> None:
    assert (
        str(InputError("a\nb\x1b[2J is not a file; Prüfung 漢字 stays"))
        == "a\\nb\\x1b[2J is not a file; Prüfung 漢字 stays"
    )
    assert str(InputError("half of a pair \ud800, unassigned \U00018d09")) == (
        "half of a pair \\ud800, unassigned \\U00018d09"
    )
