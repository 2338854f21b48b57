"""Students that generate: packed rows equal plain forwards, LoRA alone is trained, adapters load plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import WORDS
from peft import PeftModel
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
)

from armada_lib import decoders, engine
from armada_lib.methods import METHODS, Setting
from armada_lib.profiles import StudentSpec, Training
from armada_lib.sequences import sequences

VOCABULARY = 40


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """A random LlamaForCausalLM with grouped queries, as the hub lays it out."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", *WORDS]))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=None, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    return str(folder)


def spec(llama: str, **changes) -> StudentSpec:
    return StudentSpec(
        **({"name": "tiny", "checkpoint": llama, "lora": {"dropout": 0.0}} | changes)
    )


def data(n: int = 24, seed: int = 0):
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(2, VOCABULARY, size=rng.integers(low, high))
    found, cut = sequences([draw(3, 12) for _ in range(n)], [draw(1, 6) for _ in range(n)], 0, 32)
    assert cut == 0
    found.teacher = torch.from_numpy(rng.standard_normal((n, 6)).astype(np.float16))
    return found


def trained(llama: str, method: str = "armada", student=None, **settings):
    student = student or decoders.load(spec(llama), reconstructs=6, seed=1)
    t = Training(epochs=2, batch_size=8, student_lr=1e-2, precision="fp32")
    weights = {"beta": 0.1, "gamma": 1.0, "reading": "paper", "width": 6} | settings
    setting = Setting("generation", 6, t, 1, **weights)
    built = METHODS[method].build(setting, student)
    return student, built, engine.train(student, built, data(), t, 1)


def test_a_packed_batch_gives_what_the_plain_model_gives_text_by_text(llama):
    student, d = decoders.load(spec(llama), 6, 1).eval(), data()
    student.add_branch(16, 3)
    batch = d.batch(np.arange(10), True)
    out = student(batch.inputs)
    plain = AutoModelForCausalLM.from_pretrained(llama)
    at = 0
    for k, row in enumerate(batch.rows):
        ids, p = torch.from_numpy(d.tokens[row]).long()[None], int(d.prompts[row])
        with torch.no_grad():
            full = plain(ids, output_hidden_states=True)
        answers = ids.shape[1] - p
        got = out.logits[at : at + answers]
        torch.testing.assert_close(got, full.logits[0, p - 1 : -1], atol=2e-4, rtol=2e-4)
        assert batch.labels[at : at + answers].tolist() == ids[0, p:].tolist()
        mean = full.hidden_states[-1][0, :p].mean(0)
        torch.testing.assert_close(out.hidden[k], mean, atol=2e-4, rtol=2e-4)
        at += answers
    assert at == len(out.logits) == len(batch.labels)
    assert out.projection.shape == (10, 16) and out.aux_logits.shape == (10, 6)


def test_only_the_adapter_and_the_branch_are_trained(llama):
    before = {
        k: v.clone() for k, v in AutoModelForCausalLM.from_pretrained(llama).state_dict().items()
    }
    student, _, run = trained(llama)
    base = student.model.get_base_model().state_dict()
    for name, value in before.items():
        found = name if name in base else name.replace("_proj.weight", "_proj.base_layer.weight")
        assert torch.equal(base[found], value), name
    moved = [n for n, p in student.model.named_parameters() if p.requires_grad]
    assert moved and all("lora_" in n for n in moved)
    assert any(p.abs().sum() > 0 for n, p in student.model.named_parameters() if "lora_B" in n)
    assert run.curves["task"][-1] < run.curves["task"][0]
    assert run.curves["aligner_task"][-1] < run.curves["aligner_task"][0]
    assert {"task", "aux_soft", "manifold", "aligner_task", "aligner_aux"} <= run.curves.keys()


def adapter(student) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in student.model.named_parameters() if p.requires_grad}


def test_without_its_weights_armada_is_undistilled_bit_for_bit(llama):
    plain, none, full = (
        adapter(trained(llama, m, **w)[0])
        for m, w in (("undistilled", {}), ("armada", {"beta": 0.0, "gamma": 0.0}), ("armada", {}))
    )
    assert all(torch.equal(plain[k], none[k]) for k in plain)
    assert not all(torch.equal(plain[k], full[k]) for k in plain)


def test_an_adapter_loads_with_plain_peft_to_the_same_logits(llama, tmp_path):
    student, _, _ = trained(llama)
    student.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path).eval()
    d, student = data(), student.eval()
    out = student(d.batch(np.array([0]), True).inputs)
    ids, p = torch.from_numpy(d.tokens[0]).long()[None], int(d.prompts[0])
    with torch.no_grad():
        logits = plain(ids).logits[0, p - 1 : -1]
    torch.testing.assert_close(out.logits.detach(), logits, atol=2e-4, rtol=2e-4)


def test_a_killed_run_goes_on_to_the_same_end(llama, tmp_path, monkeypatch):
    whole = adapter(trained(llama)[0])
    state, seen = tmp_path / "state.safetensors", []
    student = decoders.load(spec(llama), 6, 1)
    t = Training(epochs=2, batch_size=8, student_lr=1e-2, precision="fp32")
    method = METHODS["armada"].build(
        Setting("generation", 6, t, 1, beta=0.1, gamma=1.0, width=6), student
    )
    real = engine.save

    def save_then_die(*args):
        real(*args)
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        engine.train(student, method, data(), t, 1, state=state, save_every=0.0)
    with safe_open(state, "pt") as f:
        kept = [k for k in f.keys() if k.startswith("w/student/model")]  # noqa: SIM118
    assert kept and all("lora_" in k for k in kept)  # the frozen weights are not in it
    monkeypatch.setattr(engine, "save", real)
    student = decoders.load(spec(llama), 6, 1)
    method = METHODS["armada"].build(
        Setting("generation", 6, t, 1, beta=0.1, gamma=1.0, width=6), student
    )
    engine.train(student, method, data(), t, 1, state=state, save_every=1e9)
    again = adapter(student)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize(
    "prompt, response, message",
    [
        ([], [3], "the prompt is empty"),
        ([3], [], "the response is empty"),
        ([3] * 8, [4], "has 8 tokens, the limit is 8"),
    ],
)
def test_a_bad_example_is_named(prompt, response, message):
    with pytest.raises(ValueError, match=f"example 1: .*{message}"):
        sequences([np.array([3, 4]), np.array(prompt)], [np.array([5]), np.array(response)], 0, 8)


def test_a_long_response_is_cut_and_counted():
    d, cut = sequences([np.array([3, 4])] * 2, [np.arange(9), np.arange(2)], 0, 8)
    assert cut == 1 and [len(x) for x in d.tokens] == [8, 4]


@pytest.mark.parametrize(
    "changes, message",
    [({"lora": None}, "needs a block `lora`"), ({"bits": 4}, "bits 4 needs a CUDA GPU")],
)
def test_a_student_that_cannot_be_had_is_refused(llama, changes, message):
    with pytest.raises(ValueError, match=message):
        decoders.load(spec(llama, **changes), 6, 1)


def test_an_architecture_that_cannot_be_packed_is_refused(checkpoints):
    with pytest.raises(ValueError, match="unknown generating student architecture 'bert'"):
        decoders.load(spec(checkpoints["bert"].checkpoint), 6, 1)
