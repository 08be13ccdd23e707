"Losses over scores: brute force over permutations, formulas by hand, torch's own losses, masks, extreme scores, broken input."
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from proj.core import ConfigError, DataError
from proj.losses.rank import RANK_LOSSES, PlackettLuce, RaoKupper, TemperatureSchedule, list_pairs, make_rank_loss, rank_loss_named

PAIRS = [name for name, spec in RANK_LOSSES.items() if spec.eats == "pairs"]
LISTS = [name for name, spec in RANK_LOSSES.items() if spec.eats == "lists"]
NAN = math.nan
finite = st.floats(-20, 20, allow_nan=False, width=32)


def sigmoid(x): return 1 / (1 + math.exp(-x))
def loss_of(name, **options): return make_rank_loss(name, **options).eval()
def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


# ---- pairs, by hand

@pytest.mark.parametrize("name", PAIRS)
def test_pairs_by_hand(name):
    scores, labels = draw(40, 2) * 2, torch.tensor([1, -1, 0, 1] * 10)
    expected = []
    for (a, b), y in zip(scores.tolist(), labels.tolist()):
        d, theta = a - b, 2.0
        win, lose = math.exp(a) / (math.exp(a) + theta * math.exp(b)), math.exp(b) / (math.exp(b) + theta * math.exp(a))
        tie = (theta**2 - 1) * math.exp(a + b) / ((math.exp(a) + theta * math.exp(b)) * (theta * math.exp(a) + math.exp(b)))  # as in the paper
        assert math.isclose(win + lose + tie, 1)
        if name == "margin_ranking" and y: expected.append(max(0, 0.1 - y * d))
        if name == "bradley_terry": expected.append({1: -math.log(sigmoid(d)), -1: -math.log(sigmoid(-d)), 0: -(math.log(sigmoid(d)) + math.log(sigmoid(-d))) / 2}[y])
        if name == "rao_kupper": expected.append(-math.log({1: win, -1: lose, 0: tie}[y]))
    assert abs(float(loss_of(name)(scores, labels).detach()) - sum(expected) / len(expected)) < (1e-6 if name == "rao_kupper" else 1e-9)  # theta is in fp32


def test_theta_of_rao_kupper_is_exact_enough(): assert all(abs(RaoKupper(theta).theta / theta - 1) < 1e-5 for theta in (1.001, 1.5, 2, 10, 1000))


def test_margin_and_bradley_terry_are_torchs():
    scores, labels = draw(50, 2), torch.tensor([1, -1] * 25)
    a, b = scores.T
    for margin in (0, 0.1, 2): assert torch.isclose(loss_of("margin_ranking", margin=margin)(scores, labels), nn.MarginRankingLoss(margin)(a, b, labels))
    assert torch.isclose(loss_of("bradley_terry", scale=3)(scores, labels), F.binary_cross_entropy_with_logits(3 * (a - b), (labels == 1).double()))
    assert torch.isclose(loss_of("bradley_terry")(scores, labels), F.soft_margin_loss(a - b, labels.double()))


def test_rao_kupper_without_ties_is_bradley_terry():
    scores, labels = draw(30, 2), torch.tensor([1, -1] * 15)
    assert torch.isclose(loss_of("rao_kupper", theta=1 + 1e-6)(scores, labels), loss_of("bradley_terry")(scores, labels), atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(d=st.floats(-50, 50), theta=st.floats(1.01, 50))
def test_three_outcomes_add_up(d, theta):
    p = RaoKupper(theta).log_probabilities(torch.tensor([d, -d], dtype=torch.double)).exp()
    assert torch.allclose(p.sum(-1), torch.ones(2).double()) and torch.allclose(p[0], p[1].flip(0))  # who comes first does not matter


def test_the_threshold_is_learnt_from_ties():
    few, many = (torch.tensor([1] * wins + [-1] * wins + [0] * ties) for wins, ties in ((45, 10), (10, 80)))
    for labels, share in ((few, 0.1), (many, 0.8)):
        loss = RaoKupper()
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            loss(torch.zeros(100, 2), labels).backward()
            optimizer.step()
        assert abs((loss.theta - 1) / (loss.theta + 1) - share) < 0.01  # P(tie) at equal scores


def test_without_ties_the_threshold_keeps_a_gradient():
    loss = RaoKupper()
    with torch.no_grad(): loss.raw.fill_(-60)  # as after many steps without a tie
    loss(torch.zeros(2, 2), torch.tensor([0, 0])).backward()
    assert loss.theta > 1 and torch.isfinite(loss.raw.grad) and loss.raw.grad < 0


# ---- lists, by hand and by brute force

@settings(max_examples=30, deadline=None)
@given(scores=st.lists(finite, min_size=2, max_size=6), temperature=st.floats(0.3, 5))
def test_plackett_luce_is_a_distribution_over_orders(scores, temperature):
    s, loss = torch.tensor(scores, dtype=torch.double), loss_of("plackett_luce", end=temperature)
    total = 0.0
    for order in itertools.permutations(range(len(s))):  # best first
        p, left = 1.0, list(order)
        while left:
            weights = np.exp((s[left].numpy() - s[left].numpy().max()) / temperature)
            p *= weights[0] / weights.sum()
            left.pop(0)
        truth = torch.empty_like(s)
        truth[list(order)] = torch.arange(len(s), 0, -1, dtype=torch.double)
        found = float(loss(s[None], truth[None]))
        assert abs(found + math.log(p)) <= 1e-6 * max(1, found)
        total += math.exp(-found)
    assert abs(total - 1) < 1e-6


def naive(name, scores, truth):
    "One list, all known."
    n, p = len(scores), [math.exp(s) / sum(math.exp(t) for t in scores) for s in scores]
    if name == "mnr":
        best, rest = [k for k in range(n) if truth[k] == max(truth)], [k for k in range(n) if truth[k] < max(truth)]
        return sum(-math.log(math.exp(scores[k]) / (math.exp(scores[k]) + sum(math.exp(scores[j]) for j in rest))) for k in best) / len(best)
    if name == "softmax": return -sum((truth[k] - min(truth)) * math.log(p[k]) for k in range(n)) / sum(y - min(truth) for y in truth)
    if name == "listnet": return -sum(math.exp(truth[k]) / sum(map(math.exp, truth)) * math.log(p[k]) for k in range(n))
    order = sorted(range(n), key=lambda k: -truth[k])
    return sum(math.log(sum(math.exp(scores[j]) for j in order[m:])) - scores[order[m]] for m in range(n))


@pytest.mark.parametrize("name", LISTS)
def test_lists_by_hand(name):
    scores, truth = draw(20, 5), draw(20, 5, seed=1).round(decimals=1)
    expected = np.mean([naive(name, *row) for row in zip(scores.tolist(), truth.tolist())])
    assert abs(float(loss_of(name)(scores, truth)) - expected) < 1e-9
    warm = loss_of(name, **{"end" if name == "plackett_luce" else "temperature": 2.5})
    assert abs(float(warm(2.5 * scores, truth)) - expected) < 1e-9  # the temperature divides the scores


def test_known_limits():
    right, flat = torch.tensor([[0.9, 0.5, 0.1, 0.0]]), torch.zeros(1, 4)
    assert torch.isclose(loss_of("mnr")(flat, right), torch.tensor(math.log(4)))
    assert torch.isclose(loss_of("softmax")(flat, right), torch.tensor(math.log(4))) and torch.isclose(loss_of("listnet")(flat, right), torch.tensor(math.log(4)))
    assert torch.isclose(loss_of("plackett_luce")(flat, right), torch.tensor(math.log(24)))
    scores, labels = draw(9, 7), torch.arange(9) % 7
    assert torch.isclose(loss_of("mnr", temperature=0.1)(scores, F.one_hot(labels, 7).double()), F.cross_entropy(scores / 0.1, labels))
    assert torch.isclose(loss_of("softmax")(scores, F.one_hot(labels, 7).double()), F.cross_entropy(scores, labels))
    assert torch.isclose(loss_of("listnet", target_temperature=0.1)(scores, scores / 10), F.cross_entropy(scores, scores.softmax(-1)))
    assert torch.isclose(loss_of("plackett_luce")(scores[:, :2], torch.tensor([[1.0, 0.0]]).expand(9, 2)), loss_of("bradley_terry")(scores[:, :2], torch.ones(9)))  # two candidates


def test_ties_are_stable():
    scores = draw(1, 4)
    loss, tied = loss_of("plackett_luce"), torch.tensor([[1.0, 0, 1, 0]])
    assert loss(scores, tied) == loss(scores, torch.tensor([[4.0, 2, 3, 1]]))


def test_a_list_loss_does_not_care_about_the_columns():
    scores, truth = draw(6, 5), draw(6, 5, seed=2)
    shuffle = torch.tensor([3, 1, 4, 0, 2])
    for name in RANK_LOSSES: assert torch.isclose(loss_of(name)(scores, truth), loss_of(name)(scores[:, shuffle], truth[:, shuffle]))


# ---- what all have in common

@pytest.mark.parametrize("name", RANK_LOSSES)
def test_reversed_ranks_cost_more_and_lists_are_their_pairs(name):
    scores, truth = draw(12, 6), draw(12, 6, seed=3)
    loss = loss_of(name)
    assert loss(truth, truth) < loss(scores, truth) < loss(-truth, truth)
    if RANK_LOSSES[name].eats == "pairs":
        pairs = [(row[i], row[j]) for row in scores.tolist() for i, j in itertools.combinations(range(6), 2)]
        labels = [np.sign(row[i] - row[j]) for row in truth.tolist() for i, j in itertools.combinations(range(6), 2)]
        assert torch.isclose(loss(torch.tensor(pairs), torch.tensor(labels)), loss(scores, truth).float()) and len(list_pairs(scores, truth)[1]) == 12 * 15


@pytest.mark.parametrize("name", RANK_LOSSES)
@pytest.mark.parametrize("filling", [0.0, 1e30, -1e30, math.inf, NAN])
def test_padding_changes_nothing(name, filling):
    scores, truth = draw(5, 4).float().requires_grad_(), draw(5, 4, seed=4).float()
    wide = torch.cat([scores.detach(), torch.full((5, 3), filling)], 1)[:, [4, 0, 1, 5, 2, 3, 6]]  # padding in front and between as well
    wide = torch.cat([wide, torch.full((2, 7), filling)]).requires_grad_()                         # and whole rows
    where = torch.tensor([False, True, True, False, True, True, False])
    mask = torch.cat([where.expand(5, 7), torch.zeros(2, 7).bool()])
    targets = torch.zeros(7, 7)
    targets[:5, where] = truth
    for mask, targets in ((mask, targets), (None, targets.masked_fill(~mask, NAN)), (mask, targets.masked_fill(~mask, NAN))):
        loss = loss_of(name)
        assert torch.allclose(loss(wide, targets, mask), loss(scores, truth), atol=1e-6)
        gradient, = torch.autograd.grad(loss(wide, targets, mask), wide)
        expected, = torch.autograd.grad(loss(scores, truth), scores)
        assert torch.allclose(gradient[:5, where], expected, atol=1e-6) and not gradient[:, ~where].any() and not gradient[5:].any()


@pytest.mark.parametrize("name", PAIRS)
def test_masked_pairs_do_not_count(name):
    scores, labels = draw(4, 2), torch.tensor([1, 0, -1, 1])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [0, 0]]).bool()
    assert torch.isclose(loss_of(name)(scores, labels, mask), loss_of(name)(scores[:2], labels[:2]))
    spoilt = scores.masked_fill(~mask, NAN)
    assert torch.isclose(loss_of(name)(spoilt, labels, mask), loss_of(name)(scores[:2], labels[:2]))


@pytest.mark.parametrize("name", RANK_LOSSES)
@pytest.mark.parametrize("size", [1e3, 1e6, 1e20])
def test_extreme_scores_have_finite_gradients(name, size):
    truth = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 0.0, 0.0]])
    scores = (size * torch.tensor([[1.0, 0.5, -0.5, -1.0]] * 3)).requires_grad_()
    loss = loss_of(name)(scores, truth)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(scores.grad).all() and scores.grad.abs().max() > 0


@pytest.mark.parametrize("name", RANK_LOSSES)
def test_nothing_to_learn_is_zero_with_a_gradient(name):
    for scores, truth in [(torch.zeros(0, 4), torch.zeros(0, 4)), (torch.zeros(2, 1), torch.zeros(2, 1)), (torch.ones(2, 3), torch.full((2, 3), NAN)), (torch.ones(1, 3), torch.tensor([[NAN, 1.0, NAN]]))]:
        scores.requires_grad_()
        loss = loss_of(name)(scores, truth)
        loss.backward()
        assert loss == 0 and not scores.grad.any()


@pytest.mark.parametrize("name", RANK_LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    truth = torch.tensor([[0.3, 0.9, 0.1, NAN], [0.5, 0.2, 0.7, 0.2]], dtype=torch.double)
    assert torch.autograd.gradcheck(lambda s: loss_of(name)(s, truth), draw(2, 4, seed=5).requires_grad_())


@pytest.mark.parametrize("name", RANK_LOSSES)
def test_bf16_scores_are_taken_as_fp32(name):
    scores, truth = draw(4, 5).bfloat16(), draw(4, 5, seed=6).float()
    assert loss_of(name)(scores, truth).dtype == torch.float32 and torch.equal(loss_of(name)(scores, truth), loss_of(name)(scores.float(), truth))


@pytest.mark.parametrize("name", RANK_LOSSES)
def test_every_loss_sorts_candidates(name):
    truth, scores = draw(8, 6, seed=7).float(), nn.Parameter(torch.zeros(8, 6))
    loss = make_rank_loss(name, **{"steps": 100} if RANK_LOSSES[name].steps else {})
    optimizer = torch.optim.Adam([scores, *loss.parameters()], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss(scores, truth).backward()
        optimizer.step()
    first = (scores.argmax(1) == truth.argmax(1)).all()
    assert first if name == "mnr" else (scores.argsort(1) == truth.argsort(1)).all()
    assert bool(list(loss.parameters())) == RANK_LOSSES[name].learns


# ---- the schedule

@pytest.mark.parametrize("shape, middle", [("cosine", 2), ("linear", 2), ("exponential", math.sqrt(3))])
def test_schedules_by_hand(shape, middle):
    schedule, values = TemperatureSchedule(steps=8, shape=shape), []
    for _ in range(12):
        values.append(float(schedule()))
        schedule.advance()
    t = np.minimum(np.arange(12) / 8, 1)
    expected = {"cosine": 1 + (1 + np.cos(np.pi * t)), "linear": 3 - 2 * t, "exponential": 3 ** (1 - t)}[shape]
    assert np.allclose(values, expected, atol=1e-6) and math.isclose(values[4], middle, rel_tol=1e-6) and values[8:] == [1.0] * 4
    assert float(TemperatureSchedule(shape=shape)()) == 1


def test_only_training_advances_and_the_step_is_saved(tmp_path):
    scores, truth, loss = draw(3, 4).requires_grad_(), draw(3, 4, seed=8), PlackettLuce(steps=6)
    first = loss(scores, truth)
    assert torch.isclose(first, loss_of("plackett_luce", end=3)(scores, truth)) and int(loss.temperature.step) == 1
    with torch.no_grad(): loss(scores, truth)
    loss.eval()(scores, truth)
    assert int(loss.temperature.step) == 1
    loss.train()
    for _ in range(2): loss(scores, truth)
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    other = PlackettLuce(steps=6)
    other.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    assert torch.equal(other(scores, truth), loss(scores, truth)) and int(other.temperature.step) == int(loss.temperature.step) == 4


# ---- names and broken input

def test_names_and_aliases():
    for name, spec in RANK_LOSSES.items():
        assert rank_loss_named(name) is spec and all(rank_loss_named(alias) is spec for alias in (*spec.aliases, spec.cls.__name__)) and spec.instead
        assert spec.steps == ("steps" in spec.options)
    assert len({alias.lower() for spec in RANK_LOSSES.values() for alias in (spec.name, *spec.aliases)}) == sum(1 + len(spec.aliases) for spec in RANK_LOSSES.values())


@pytest.mark.parametrize("name, options, message", [
    ("margin_ranking", dict(margin=-1), "margin is -1"), ("margin_ranking", dict(margin=NAN), "margin is nan"), ("bradley_terry", dict(scale=0), "scale is 0"),
    ("rao_kupper", dict(theta=1), "theta is 1"), ("mnr", dict(temperature=0), "temperature is 0"), ("listnet", dict(target_temperature=math.inf), "target_temperature is inf"),
    ("plackett_luce", dict(steps=0), "steps is 0"), ("plackett_luce", dict(shape="cosin"), "did you mean 'cosine'"), ("plackett_luce", dict(start=-3), "start is -3"),
    ("mnr", dict(margin=1), "no option 'margin'"), ("margin_rankin", {}, "did you mean 'margin_ranking'"),
])
def test_wrong_options_are_one_line(name, options, message):
    with pytest.raises(ConfigError) as error: make_rank_loss(name, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", RANK_LOSSES)
def test_wrong_shapes_are_one_line(name):
    some = torch.zeros(3, 4)
    for scores, targets, mask in [(some, torch.zeros(3, 5), None), (some, torch.zeros(4), None), (some, some, torch.ones(3).bool()), (torch.zeros(4), torch.zeros(4), None),
                                  (torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), None), (torch.zeros(3, 2), torch.zeros(2), None)]:
        with pytest.raises(DataError, match=r"got scores \(") as error: loss_of(name)(scores, targets, mask)
        assert "\n" not in str(error.value) and "eats" in str(error.value)
    with pytest.raises(DataError, match="labels hold" if RANK_LOSSES[name].eats == "pairs" else "got scores"): loss_of(name)(torch.zeros(3, 2), torch.tensor([1, 0, 2]))
    with pytest.raises(DataError): loss_of(name)(torch.zeros(2, 2), torch.tensor([1.0, NAN]))
