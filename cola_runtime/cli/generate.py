"""`cola generate`: try an adapter, or the bare base model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cola_runtime.cli.options import JsonFlag, UrlOption

if TYPE_CHECKING:
    from cola_runtime.client.sdk import Client, Generation


def generate(
    prompt: Annotated[str, typer.Argument(help="The text, or - to read it from stdin.")],
    job: Annotated[str | None, typer.Option("--job", "-j", help="Use this job's adapter.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask as a chat user, in the model's template.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="System message; implies --chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    base_model: Annotated[str, typer.Option("--base-model", help="Which base model, without --job.")] = "",
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Continue a text, or answer it (--chat), with a job's adapter or the bare base model.

    An encoder-decoder reads the text and writes its own.
    """
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.output import clean_block, print_json

    text = sys.stdin.read() if prompt == "-" else prompt
    question = _messages(text, system) if chat or system else text
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with connected(url) as client:
        answer = _ask(client, question, job, base_model, options)
    if as_json:
        print_json(answer)
    else:
        typer.echo(clean_block(answer.text))


def _ask(
    client: Client,
    question: str | list[dict[str, str]],
    job: str | None,
    base_model: str,
    options: dict[str, Any],
) -> Generation:
    if job:
        return client.job(job).generate(question, **options)
    return client.generate(question, base_model=base_model, **options)


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]
