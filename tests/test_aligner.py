"""The aligner: counts, forms, orthogonality through training, and no trace on the student."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from armada_lib.aligner import TSAligner, drift, orthogonal_, retract_


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def heads(aligner: TSAligner) -> int:
    return count(aligner.output_head) + count(aligner.aux_head)


def vectors(b: int, m: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, m, generator=torch.Generator().manual_seed(seed))


# Counts and shapes -------------------------------------------------------------------------------


def test_the_recommended_aligner_has_the_papers_size():
    plain, affine = TSAligner(1024, 2), TSAligner(1024, 2, projection_bias=True)
    own = {n: p for n, p in plain.named_parameters() if "head" not in n}
    assert sum(p.numel() for n, p in own.items() if not n.endswith("bias")) == 819_200
    assert count(plain) - heads(plain) == 820_096
    assert count(affine) - heads(affine) == 820_864
    assert count(affine) == 823_940
    assert not [n for n, _ in plain.named_parameters() if n == "projection_bias"]


def test_the_other_readings_have_their_sizes():
    direct, released = TSAligner(1024, 2, form="direct"), TSAligner(1024, 2, form="released")
    assert sum(p.numel() for n, p in direct.map.named_parameters() if "weight" in n) == 786_432
    assert "projection" in dict(direct.named_buffers())
    assert count(released.map) == 787_456
    assert released.projection.numel() == 1024**2
    assert count(TSAligner(262_144, 2).map[0]) == 262_144 * 128 + 128


@pytest.mark.parametrize(
    ("form", "hidden", "shared"),
    [("bottleneck", 768, 768), ("direct", 768, 768), ("released", 512, 96)],
)
@pytest.mark.parametrize("outputs", [1, 3])
def test_shapes(form: str, hidden: int, shared: int, outputs: int):
    out = TSAligner(96, outputs, form=form)(vectors(5, 96))
    assert out._fields == ("logits", "hidden", "projection", "aux_logits")
    shapes = [tuple(x.shape) for x in out]
    assert shapes == [(5, outputs), (5, hidden), (5, shared), (5, outputs)]


def test_every_part_computes_what_its_name_says():
    a = TSAligner(96, 3, hidden=40, shared=24, seed=3)
    h = vectors(5, 96)
    first, second = a.map[0], a.map[2]
    hidden = torch.tanh(second(torch.tanh(first(h))))
    projection = hidden @ a.projection.T
    out = a(h)
    assert first.out_features == 128
    torch.testing.assert_close(out.hidden, hidden)
    torch.testing.assert_close(out.projection, projection)
    torch.testing.assert_close(out.logits, a.output_head(hidden))
    torch.testing.assert_close(out.aux_logits, a.aux_head(projection))


def test_the_released_form_projects_the_raw_vector():
    a = TSAligner(96, 3, form="released", seed=3).eval()
    h = vectors(5, 96)
    out = a(h)
    torch.testing.assert_close(out.projection, h @ a.projection.T)
    torch.testing.assert_close(out.aux_logits, a.aux_head(out.projection))
    linear = [m for m in a.map if isinstance(m, nn.Linear)]
    assert [m.weight.std().item() for m in linear] == pytest.approx([0.02, 0.02], rel=0.05)
    assert all((m.bias == 0).all() for m in linear)
    torch.testing.assert_close(
        out.hidden, torch.relu(linear[1](torch.relu(linear[0](h))))
    )  # no dropout in evaluation


def test_stored_float16_vectors_are_taken_as_they_are():
    a, h = TSAligner(96, 3), vectors(5, 96).half()
    assert a(h).logits.dtype == torch.float32
    torch.testing.assert_close(a(h).logits, a(h.float()).logits)


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "deep"}, r"'deep'.*bottleneck.*direct.*released"),
        ({"activation": "swish"}, r"'swish'.*gelu.*relu.*tanh"),
        ({"activation": ""}, "unknown activation ''"),
        ({"outputs": 0}, "outputs=0"),
        ({"dropout": 1.0}, "dropout"),
        ({"form": "released", "shared": 768}, "shared width is 96"),
        ({"form": "released", "width": 262_144}, r"274\.9 GB.*bottleneck.*direct.*reduce"),
    ],
)
def test_bad_options_stop_at_once(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TSAligner(**({"width": 96, "outputs": 2} | options))


def test_vectors_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"\(b, 96\), got \(5, 95\)"):
        TSAligner(96, 2)(vectors(5, 95))


# Orthogonality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [384, 768, 1536, 2048])
def test_projections_stay_orthogonal_through_training(d: int):
    """P is 768 x d, as on a student of width d: rows orthonormal if d >= 768, else columns."""
    p = nn.Parameter(orthogonal_(torch.empty(768, d), torch.Generator().manual_seed(d)))

    def error() -> float:
        eye = torch.eye(min(768, d))
        return (((p @ p.T) if d >= 768 else (p.T @ p)) - eye).abs().max().item()

    assert error() < 1e-5
    assert drift(p) == pytest.approx(error(), abs=1e-6)
    optimiser = torch.optim.AdamW([p], lr=3e-3)
    x, y = vectors(8, d, 1), vectors(8, 768, 2)
    for _ in range(2):
        optimiser.zero_grad()
        (x @ p.T - y).square().mean().backward()
        optimiser.step()
        assert drift(p) > 1e-2  # a step leaves the orthogonal matrices
        before = p.detach().clone()
        address = p.data_ptr()
        assert retract_(p) is p and p.data_ptr() == address and p.requires_grad
        assert drift(p) < 1e-5
        assert not torch.equal(p, before)


def test_a_trained_aligner_stays_orthogonal_and_a_fixed_projection_does_not_move():
    for form in ("bottleneck", "direct", "released"):
        a = TSAligner(64, 2, form=form)
        start = a.projection.detach().clone()
        optimiser = torch.optim.AdamW(a.parameters(), lr=3e-3)
        for _ in range(3):
            optimiser.zero_grad()
            out = a(vectors(8, 64))
            (out.logits.square().sum() + (out.aux_logits - 1).square().sum()).backward()
            optimiser.step()
            for w in a.orthogonal_weights():
                retract_(w)
        assert drift(a.projection) < 1e-5
        assert torch.equal(a.projection, start) == (form == "direct")
        assert len(a.orthogonal_weights()) == (form != "direct")


def test_retraction_leaves_an_orthogonal_matrix_and_makes_small_steps_of_small_steps():
    for shape in ((20, 20), (20, 50), (50, 20)):
        w = orthogonal_(torch.empty(shape, dtype=torch.float64), torch.Generator().manual_seed(1))
        assert torch.allclose(retract_(w.clone()), w, atol=1e-12)
        step = 1e-4 * torch.randn(shape, dtype=torch.float64)
        assert (retract_(w + step) - w).norm() < 2 * step.norm()


def test_a_square_projection_keeps_lengths():
    a, h = TSAligner(64, 2), vectors(6, 64)
    out = a(h)
    torch.testing.assert_close(out.projection.norm(dim=1), out.hidden.norm(dim=1))
    torch.testing.assert_close(out.projection @ a.projection, out.hidden)  # P' undoes P


def test_retraction_works_on_bf16_and_refuses_vectors():
    w = torch.randn(30, 40).bfloat16()
    assert retract_(w).dtype == torch.bfloat16
    assert drift(w) < 2e-2
    with pytest.raises(ValueError, match="matrix"):
        retract_(torch.randn(3))


def test_a_random_orthogonal_matrix_has_no_preferred_sign():
    g = torch.Generator().manual_seed(0)
    first = torch.stack([orthogonal_(torch.empty(3, 3), g)[0, 0] for _ in range(400)])
    assert abs(first.mean().item()) < 0.1  # without the sign of R it is about -0.5


# The student must not notice ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bottleneck", "direct", "released"])
def test_the_global_random_state_is_untouched(form: str):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    a = TSAligner(64, 2, form=form)
    a.eval()(vectors(4, 64)).logits.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", ["bottleneck", "direct", "projected", "released"])
def test_the_seed_alone_decides(form: str):
    torch.manual_seed(1)
    a = TSAligner(64, 2, form=form, seed=5)
    torch.manual_seed(2)
    b, other = TSAligner(64, 2, form=form, seed=5), TSAligner(64, 2, form=form, seed=6)
    for (name, x), y, z in zip(
        a.state_dict().items(), b.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(x, y)
        if x.is_floating_point() and (x != 0).any():
            assert not torch.equal(x, z), name


def test_dropout_drops_its_share():
    a, h = TSAligner(64, 2, dropout=0.25, activation="gelu"), vectors(50, 64)
    draws = [a(h).hidden for _ in range(2)]
    for x in draws:
        assert (x == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(*draws)
    dropout = a.map[-1]
    assert dropout(torch.ones(4000)).mean().item() == pytest.approx(1, abs=0.05)
    a.eval()
    assert torch.equal(a(h).hidden, a(h).hidden)
    assert (a(h).hidden != 0).all()


def test_the_projected_form_trains_688128_weights_on_128_numbers():
    a = TSAligner(1024, 2, form="projected")
    trained = [p for n, p in a.named_parameters() if p.ndim > 1 and "head" not in n]
    assert sum(p.numel() for p in trained) == 128 * 768 + 768 * 768 == 688_128
    assert not a.reduce.requires_grad
    x = F.linear(torch.randn(2000, 1024), a.reduce)
    assert x.shape == (2000, 128) and x.std().item() == pytest.approx(1, abs=0.05)
