"""Where the throughput benchmark's rows of chats begin and end."""

from __future__ import annotations

from itertools import islice

from cola_runtime.testing.chat_rows import joined, messages_from

SENDERS = [["a b", "c"], ["d  e f"], ["g"]]


def test_messages_begin_at_ones_own_sender_and_go_around() -> None:
    assert list(islice(messages_from(SENDERS, 1), 6)) == ["d  e f", "g", "a b", "c", "d  e f", "g"]


def test_a_text_ends_with_the_message_that_makes_it_long_enough() -> None:
    assert list(joined(messages_from(SENDERS[:2], 0), iter([3, 2, 5]), len)) == [
        "a b",
        "c d e f",
        "a b c",
    ]
