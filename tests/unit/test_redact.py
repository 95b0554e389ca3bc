"""What a URL shows of itself."""

from __future__ import annotations

import pytest

from rto_fast.redact import redacted, without_credentials


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host:81/rm", "http://host:81/rm"),
        ("http://user:secret@host:81/rm?key=secret#secret", "http://host:81/rm"),
        ("https://secret@host", "https://host"),
        ("https://user:sec@ret@host/a@b", "https://host/a@b"),
        ("http://[fd00::1]:80/x?secret", "http://[fd00::1]:80/x"),
        ("http://host?key=secret and more", "http://host"),
        ("http://user:sec#ret@host/x", "http://***"),
        ("http://user:sec?ret@host/x", "http://***"),
        ("http://user:sec/ret@host/x", "http://***"),
        ("http://host:81/rm/a@b", "http://host:81/rm/a@b"),
        ("http://[fd00::1]:80/x?to=a@b", "http://[fd00::1]:80/x"),
        ("--reward-url=http://u:secret@host/rm?secret", "--reward-url=http://host/rm"),
        ("--wandb-project", "--wandb-project"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("what is this? a#b", "what is this? a#b"),
        ("://", "://"),
    ],
)
def test_a_url_is_cut_down_to_what_is_no_secret(url, shown):
    assert without_credentials(url) == shown


def test_settings_are_redacted_at_any_depth_and_left_as_they_are():
    settings = {"a": ("http://u:secret@h/x", "plain"), "b": [{"c": "http://h?secret"}], "d": 0.5, "e": None, "f": True}
    shown = {"a": ("http://h/x", "plain"), "b": [{"c": "http://h"}], "d": 0.5, "e": None, "f": True}
    assert redacted(settings) == shown
    assert settings["a"][0] == "http://u:secret@h/x"
