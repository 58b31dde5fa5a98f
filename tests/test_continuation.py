"""Continuations: stop strings, what is read twice, conversations, interrupts, batches."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftc.graph.cached import step_inputs
from ftc.graph.errors import UsageError
from ftc.runtime.chat import Chat
from ftc.runtime.compile import compile_model
from ftc.runtime.continuation import Asked, Saying, generate
from ftc.runtime.decoder import Decoder
from ftc.runtime.engine import open_engine
from ftc.tests.conftest import Command
from ftc.tests.small import decoder, short_decoder

TEMPLATE = (
    "{% for m in messages %}{{ 'the ' if m.role == 'assistant' }}{{ m.content }} . {% endfor %}"
    "{% if add_generation_prompt %}the{% endif %}"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a cache, and a template for conversations."""
    folder = tmp_path_factory.mktemp("generate")
    model = decoder(folder / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    compile_model(model, "", folder / "out", task="generate")
    return folder / "out"


class Letters:
    """A tokenizer of one letter a token; token 9 is the end."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join("abcdefgh"[i] for i in ids)


class Words:
    """A tokenizer of one word a token, which begins a text without the space before it."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join("abcdefgh"[i] for i in ids)


def said(tokens: list[int], stops: list[str]) -> tuple[list[str], Saying]:
    saying = Saying(Letters(), frozenset({9}), stops)
    pieces = []
    for token in tokens:
        pieces.append(saying.add(token))
        if saying.done:
            return pieces, saying
    return [*pieces, saying.end()], saying


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.text("abc", min_size=1), max_size=3))
def test_text_ends_before_the_first_stop_string(tokens, stops):
    pieces, saying = said(tokens, stops)
    whole = Letters().decode(tokens)
    # The first to be complete ends the text, wherever another one began.
    lengths = [n for n in range(len(whole) + 1) if any(s in whole[:n] for s in stops)]
    seen = whole[: lengths[0]] if lengths else whole
    places = [seen.find(s) for s in stops if s in seen]
    assert "".join(pieces) == saying.text == seen[: min(places, default=len(seen))]


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=20), st.lists(st.integers(0, 7), min_size=1)
)
def test_text_and_continuation_are_the_whole_text(before, tokens):
    """The space between them is there, which a tokenizer leaves out where a text begins."""
    saying = Saying(Words(), frozenset(), (), before)
    pieces = [saying.add(token) for token in tokens]
    whole = Words().decode([*before, *tokens])
    assert Words().decode(before) + "".join(pieces) + saying.end() == whole
    assert Saying(Words(), frozenset(), ()).add(tokens[0]) == Words().decode(tokens[:1])


def test_special_tokens_end_a_text_by_name_and_are_not_shown(bundle):
    engine = open_engine(str(bundle))
    found = engine.spoken.tokenizer
    (name, number), *_ = [(str(t), n) for n, t in found.added_tokens_decoder.items() if t.special]
    assert engine.spoken.special([name, "the"]) == {number}
    saying = Saying(found, engine.spoken.special([name]), (name,))
    (the,) = found("the", add_special_tokens=False)["input_ids"]
    assert saying.add(the) == "the" and saying.add(number) == "" and saying.done
    assert Saying(found, frozenset(), ()).add(number) == ""


def test_a_text_ends_where_the_model_does_and_a_note_tells_it(tmp_path, command: Command):
    model = short_decoder(tmp_path / "model")
    compile_model(model, "", tmp_path / "out", task="generate")
    call = ("run", tmp_path / "out", "--max-new-tokens", 99, "--json", "--text", "the cat")
    alone = command(*call).data
    assert "the text ends" in alone["notes"][0]
    both = command(*call, "--text", "the cat sits on the mat").data
    assert "the others with it" in both["notes"][0]
    assert alone["continuations"][0].startswith(both["continuations"][0])
    assert command(*call[:3], 1, *call[4:]).data["notes"] == []


def test_rotary_positions_end_where_the_models_files_say(tmp_path, command: Command):
    model = decoder(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    compile_model(model, "", tmp_path / "out", task="generate")
    ran = command("run", tmp_path / "out", "--text", "the cat " * 8)
    assert ran.status == 2 and "takes 16" in ran.err
    ran = command("run", tmp_path / "out", "--text", "the cat", "--max-new-tokens", 40, "--json")
    assert "there are 16 tokens" in ran.data["notes"][0]


def test_the_beginning_of_a_stop_string_waits():
    assert said([0, 1, 2, 3], ["bcx"])[0] == ["a", "", "", "bcd", ""]
    assert said([0, 1, 9], ["bc"])[0] == ["a", "", "b"]


class Counting:
    """An engine that notes how many tokens each run reads."""

    def __init__(self, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[int] = []
        run = decoder._run
        monkeypatch.setattr(
            decoder, "_run", lambda *x: (self.read.append(x[0].shape[1]), run(*x))[1]
        )


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_what_was_read_is_not_read_again(bundle, engine, monkeypatch):
    opened = open_engine(str(bundle), engine)
    kept = Decoder(opened)
    counting = Counting(kept, monkeypatch)
    calls = [[[5, 6, 7], [5, 6]], [[5, 6, 7, 8], [5, 6, 9]], [[5, 6, 7, 8, 9, 9], [5, 6, 9, 9, 9]],
             [[5, 6, 7], [5, 6]], [[5, 6, 7, 8]]]  # fmt: skip
    for rows in calls:
        torch.testing.assert_close(kept(rows), Decoder(opened)(rows), atol=1e-5, rtol=1e-4)
    assert counting.read == [3, 1, 2, 3, 4]


def test_values_stay_in_onnxruntime(bundle):
    """The same outputs as values and as tensors; and what comes out goes in as it is."""
    session = open_engine(str(bundle), "onnx").session
    inputs = open_engine(str(bundle), "torch").program.signature.probe(seed=1)
    held, plain = session.run_held(inputs), session.run(inputs)
    for name, tensor in plain.items():
        torch.testing.assert_close(torch.from_numpy(held[name].numpy()), tensor)
    again = {n: held.get(n.replace("past_", "present_"), t) for n, t in inputs.items()}
    again["past_mask"] = torch.ones(again["input_ids"].shape[0], held["present_key_0"].shape()[2],
                                    dtype=inputs["past_mask"].dtype)  # fmt: skip
    assert session.run_held(again)["present_key_0"].shape()[2] > held["present_key_0"].shape()[2]


def test_tensors_of_a_first_step_have_an_empty_past(bundle, tmp_path, command: Command):
    signature = open_engine(str(bundle), "torch").program.signature
    ids = torch.tensor([[5, 6, 7]])
    step = step_inputs(signature, ids, torch.ones_like(ids), {})
    np.savez(tmp_path / "x.npz", **{name: tensor.numpy() for name, tensor in step.items()})
    ran = command("run", bundle, "--input", tmp_path / "x.npz", "--json")
    assert torch.tensor(ran.data["outputs"]["present_key_0"]).shape[2] == 3
    np.savez(tmp_path / "x.npz", **{n: t[:0].numpy() for n, t in step.items()})
    ran = command("run", bundle, "--input", tmp_path / "x.npz")
    assert ran.status == 2 and "is empty" in ran.err


def test_a_conversation_reads_only_what_is_new(bundle, monkeypatch):
    chat = Chat(open_engine(str(bundle)), Asked(4))
    counting = Counting(chat._decoder, monkeypatch)
    first = "".join(chat.say("the cat sits"))
    assert chat.messages == [{"role": "user", "content": "the cat sits"},
                             {"role": "assistant", "content": first}]  # fmt: skip
    started = counting.read[0]
    monkeypatch.setattr(chat, "_asked", Asked(1))
    list(chat.say("a dog"))
    template = chat._tokenizer.apply_chat_template(chat.messages[:3], tokenize=False,
                                                   add_generation_prompt=True)  # fmt: skip
    whole = len(chat._tokenizer(template, add_special_tokens=False)["input_ids"])
    assert counting.read[-1] < whole and started < whole


def test_an_answer_that_is_left_is_kept_as_far_as_it_came(bundle):
    chat = Chat(open_engine(str(bundle)), Asked(6))
    answer = chat.say("the cat")
    piece = next(answer)
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": piece}


def test_chat_on_the_command_line(bundle, command: Command, monkeypatch):
    ran = command("run", bundle, "--chat", "--text", "the cat", "--text", "a dog",
                  "--max-new-tokens", 3, "--json")  # fmt: skip
    assert [m["role"] for m in ran.data["messages"]] == ["user", "assistant"] * 2
    assert len(ran.data["paces"]) == 2 and ran.data["paces"][0]["first_token_seconds"] > 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n\na dog\n"))
    typed = command("run", bundle, "--chat", "--max-new-tokens", 3)
    assert typed.status == 0 and typed.out.count("tokens/s") == 2


def test_chat_needs_a_template(tmp_path, bundle, command: Command):
    ran = command("run", decoder(tmp_path / "model"), "--chat", "--text", "x")
    assert ran.status == 2 and "no chat template" in ran.err
    ran = command("run", bundle, "--chat", "--input", "x.npz")
    assert ran.status == 2 and "texts or tensors" in ran.err


def test_an_interrupt_ends_the_line(bundle, command: Command, monkeypatch):
    calls, score = [], Decoder.__call__

    def interrupted(self, rows):
        calls.append(rows)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return score(self, rows)

    monkeypatch.setattr(Decoder, "__call__", interrupted)
    ran = command("run", bundle, "--text", "the cat")
    assert ran.status == 130 and ran.out.startswith("the cat") and ran.out.endswith("\n")
    assert not ran.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\na dog\n"))
    ran = command("run", bundle, "--chat")  # an answer ends, the conversation goes on
    assert ran.status == 0 and len(calls) == 9


def test_a_batch_says_what_each_says_alone(bundle, command: Command):
    texts = ["the cat sits on", "a dog", "the sky is"]
    call = ("run", bundle, "--max-new-tokens", 6, "--json")
    together = command(*call, *(w for t in texts for w in ("--text", t))).data
    alone = [command(*call, "--text", text).data["continuations"][0] for text in texts]
    assert together["continuations"] == alone
    assert together["tokens_per_second"] > 0 and together["first_token_seconds"] > 0


def test_stop_strings_on_the_command_line(bundle, command: Command):
    whole = "".join(generate(open_engine(str(bundle)), "the cat", Asked(8)))
    stop = whole.split()[3]
    ran = command("run", bundle, "--text", "the cat", "--max-new-tokens", 8, "--stop", stop,
                  "--json")  # fmt: skip
    assert ran.data["continuations"] == [whole[: whole.find(stop)]]
    assert command("run", bundle, "--text", "the cat", "--stop", "").status == 2


def test_a_device_or_a_compiler_that_is_not_there(bundle, monkeypatch):
    """What is asked for is there, or refused: nothing else runs in its place."""
    import onnxruntime

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for engine in ("onnx", "torch"):
        with pytest.raises(UsageError, match=r"GPU|CUDA") as caught:
            open_engine(str(bundle), engine, device="cuda")
        assert "--device cpu" in caught.value.fix
    with pytest.raises(UsageError, match="onnxruntime"):
        open_engine(str(bundle), "onnx", compiled=True)


def test_compiled_says_the_same(bundle):
    """Through torch.compile, its graph run as it is: no compiler is needed for that."""
    plain = open_engine(str(bundle), "torch")
    wanted = "".join(generate(plain, "the cat", Asked(6)))
    compiled = open_engine(str(bundle), "torch", compiled=True)
    object.__setattr__(compiled, "_run", torch.compile(compiled.program.module, backend="eager",
                                                       dynamic=True))  # fmt: skip
    assert "".join(generate(compiled, "the cat", Asked(6))) == wanted
    assert "compiled" in compiled.label
