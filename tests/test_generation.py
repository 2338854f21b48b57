"""Answers do not depend on the batch, a killed call goes on, choices are weighed as by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_decoders import llama, spec  # noqa: F401  (a fixture)

from armada_lib import decoders, decoding, generation

PROMPTS = [
    "the cat sat on",
    "a dog",
    "the red bird flew over a tree",
    "who saw the house",
    "blue",
    "the dog ran",
]


@pytest.fixture
def student(llama):  # noqa: F811
    found = decoders.load(spec(llama), 6, 1)
    with torch.no_grad():  # an adapter that does something
        for name, p in found.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(4))
    return found.eval()


def by_hand(student, prompt: str, new_tokens: int) -> str:
    """Greedy decoding of one prompt without a cache."""
    student.model.get_base_model().set_attn_implementation("eager")
    ids = list(student.tokenizer(prompt).input_ids)
    start = len(ids)
    for _ in range(new_tokens):
        with torch.no_grad():
            ids.append(int(student.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 1:
            break
    student.model.get_base_model().set_attn_implementation("armada_packed")
    return student.tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_greedy_answers_are_those_of_one_prompt_alone(student, batch):
    found = generation.generate(student, PROMPTS, 8, batch_size=batch)
    assert found == [by_hand(student, p, 8) for p in PROMPTS]
    assert len(set(found)) > 1


@pytest.mark.parametrize("wide", [True, False])
def test_either_library_of_matrix_products_gives_the_answers(student, monkeypatch, wide):
    monkeypatch.setattr(generation, "_wide", lambda: wide)
    swapped, swap = [], generation._onednn
    monkeypatch.setattr(generation, "_onednn", lambda m: swapped.extend(swap(m)) or swapped)
    found = generation.generate(student, PROMPTS, 8)
    assert found == [by_hand(student, p, 8) for p in PROMPTS] and bool(swapped) == wide


@pytest.mark.parametrize("wide", [True, False])
def test_the_student_is_as_before_afterwards(student, monkeypatch, wide):
    monkeypatch.setattr(generation, "_wide", lambda: wide)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    generation.generate(student, PROMPTS[:2], 4)
    after = dict(student.named_parameters())
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0)
    assert student.model.get_base_model().config._attn_implementation == "armada_packed"


def test_samples_depend_on_seed_and_example_alone(student):
    together = generation.generate(student, PROMPTS, 6, seed=3)
    assert together == generation.generate(student, PROMPTS, 6, seed=3, batch_size=2)
    assert together != generation.generate(student, PROMPTS, 6, seed=4)
    greedy = generation.generate(student, PROMPTS, 6)
    assert generation.generate(student, PROMPTS, 6, seed=3, temperature=1e-6) == greedy


@pytest.mark.parametrize("batch", [3, 32])
def test_sets_and_seeds_share_batches_that_read_a_prompt_once(
    student, monkeypatch, tmp_path, batch
):
    parts, seeds = (PROMPTS[:2], PROMPTS[2:], PROMPTS[:1]), [0, 1, 2]
    sets = [(tmp_path / f"{n}.jsonl", prompts) for n, prompts in enumerate(parts)]
    each = [[generation.generate(student, p, 6, seed=n) for n in seeds] for p in parts]
    real, seen = decoding.share, []
    monkeypatch.setattr(decoding, "share", lambda x: seen.append((len(x), real(x))) or seen[-1][1])
    assert generation.samples(student, sets, 6, seeds, batch_size=batch) == each
    texts = 3 * (len(PROMPTS) + 1)
    assert sum(n for n, _ in seen) == texts and len(seen) == -(-texts // batch)
    whole = sum(len(x) for p in parts for x in generation.tokens(student, p, 6))
    assert sum(len(ids) for _, (ids, _, _) in seen) <= whole
    monkeypatch.setattr(decoding, "share", None)  # kept answers are not made again
    for (file, prompts), said in zip(sets, each, strict=True):
        assert generation.generate(student, prompts, 6, file, seed=1) == said[1]


def test_gumbel_noise_draws_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0]).repeat(4000, 1)
    drawn = generation.Gumbel(range(4000), 1.0)(logits, range(4000))
    share = torch.bincount(drawn, minlength=3) / 4000
    torch.testing.assert_close(share, torch.softmax(logits[0], 0), atol=0.03, rtol=0)


def test_a_killed_call_goes_on_where_it_stopped(student, tmp_path, monkeypatch):
    whole, kept = generation.generate(student, PROMPTS, 6), tmp_path / "a.jsonl"
    real, calls = decoding.decode, []

    def dies(model, texts, *a):
        calls.append(len(texts))
        for n, found in enumerate(real(model, texts, *a)):
            if len(calls) == 3 and n == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(decoding, "decode", dies)
    with pytest.raises(KeyboardInterrupt):
        generation.generate(student, PROMPTS, 6, kept, batch_size=2)
    with kept.open("a") as f:
        f.write('["torn')  # as a kill in the middle of a line leaves it
    assert generation.generate(student, PROMPTS, 6, kept, batch_size=2) == whole
    assert calls == [2, 2, 2, 1]  # the third call's first answer is not made again
    assert generation.generate(student, PROMPTS, 6, kept) == whole and len(calls) == 4


def likelihoods(student, prompts, choices):
    """What `generation.choose` picks by."""
    with torch.inference_mode(), generation._plain(student) as model:
        return decoding.likelihoods(
            model,
            generation.tokens(student, prompts, 8),
            [[student.answer_ids(c) for c in cs] for cs in choices],
        )


def test_likelihoods_are_sums_over_the_choices_own_tokens(student):
    choices = [["the house", "a tree"], ["ran", "sat quickly", "flew"]]
    found = likelihoods(student, PROMPTS[:2], choices)
    student.model.get_base_model().set_attn_implementation("eager")
    for prompt, options, (total, length) in zip(PROMPTS, choices, found, strict=False):
        for option, value, n in zip(options, total, length, strict=True):
            a = student.tokenizer(prompt).input_ids
            b = student.tokenizer(option, add_special_tokens=False).input_ids
            with torch.no_grad():
                logp = torch.log_softmax(student.model(torch.tensor([a + b])).logits[0], -1)
            expected = sum(logp[len(a) - 1 + k, t].item() for k, t in enumerate(b))
            assert value == pytest.approx(expected, abs=1e-3) and n == len(b)
    assert [len(t) for t, _ in found] == [2, 3] and isinstance(found[0][0], np.ndarray)


def test_the_choice_of_highest_mean_likelihood_is_picked_and_kept(student, tmp_path, monkeypatch):
    choices = [["the house", "a tree"], ["ran", "sat quickly", "flew"], ["blue", "red"]]
    (picked,) = generation.choose(student, [(None, PROMPTS[:3])], [choices])
    for options, (total, n), choice in zip(
        choices, likelihoods(student, PROMPTS[:3], choices), picked, strict=True
    ):
        assert choice == options[int(np.argmax(total / n))]
    kept, real, calls = tmp_path / "c.jsonl", decoding.likelihoods, []

    def dies(model, prompts, options):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, prompts, options)

    monkeypatch.setattr(decoding, "likelihoods", dies)
    with pytest.raises(KeyboardInterrupt):
        generation.choose(student, [(kept, PROMPTS[:3])], [choices], batch_size=1)
    again = generation.choose(student, [(kept, PROMPTS[:3])], [choices], batch_size=1)
    assert again == [picked]
    assert calls == [1, 1, 1, 1]  # the first choice is not made again


def test_a_prompt_that_begins_with_the_start_token_gets_no_second():
    class Starts:  # begins with a start token of its own, as LLaMA's tokenizer does
        bos_token = "<s>"

        def __call__(self, text, add_special_tokens):
            words = ["<s>"] * add_special_tokens + text.split()
            return SimpleNamespace(input_ids=[0 if w == "<s>" else len(w) for w in words])

    reader = SimpleNamespace(tokenizer=Starts())
    read = lambda text: decoders.Decoder.prompt_ids(reader, text).tolist()
    assert read("the cat sat") == [0, 3, 3, 3] and read("<s> the cat") == [0, 3, 3]


def test_bf16_weights_are_left_as_they_are(llama):  # noqa: F811
    student = decoders.load(spec(llama), 6, 1, precision="bf16").eval()
    base = {n: p for n, p in student.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in base.values()} == {torch.bfloat16}
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    before = {n: p.clone() for n, p in base.items()}
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.fill_(1e-3)
    generation.generate(student, PROMPTS[:2], 4, bf16=True)
    assert all(torch.equal(before[n], p) for n, p in base.items())


@pytest.mark.parametrize(
    "prompts, message",
    [
        (["the cat", " "], "prompt 1 of 2 is empty"),
        (["the cat", "the " * 60], "prompt 1 has 6. tokens"),
    ],
)
def test_bad_prompts_are_named_before_any_answer(student, monkeypatch, prompts, message):
    monkeypatch.setattr(decoding, "decode", lambda *a: pytest.fail("answered"))
    with pytest.raises(ValueError, match=message):
        generation.generate(student, prompts, 8)
