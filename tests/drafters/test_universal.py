"""Drafts of another vocabulary: the tokens that they read, their translated proposals, and the unchanged output."""

from __future__ import annotations

import functools
import gc
import itertools
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from specdecode import (
    LM,
    Generation,
    KeepAll,
    Sampling,
    SinkWindow,
    TokenizerMismatchError,
    UniversalDrafter,
    generate,
)
from specdecode.controllers.base import Limit
from specdecode.core.sampling import Rng
from specdecode.drafters import universal
from specdecode.drafters.base import Context
from tests.helpers.discovery import examples
from tests.helpers.enumeration import BranchRng, distribution_of
from tests.helpers.learnt import learnt
from tests.helpers.models import ARCHITECTURES, build, continuation, lm, logits, small
from tests.helpers.spelling import CHARACTERS, byte_pairs, characters, pieces

TEXT = (
    'The quick brown fox jumps over the lazy dog, and the dog\'s 2 friends laugh: "Ha ha!" Then it went home.\nIt was'
)
ELSEWHERE = TEXT.replace("lazy dog", "lazy cat").replace("home", "away")
BEGINNING = TEXT[: TEXT.index(" fox")]
# Characters of one to four bytes.
WIDE = "Un café à 3 €: 你好世界, 😀😀 dit Zoë."
WIDE_CHARACTERS = [*CHARACTERS, *sorted(set(WIDE) - set(CHARACTERS))]
# The vocabulary size of untrained models: larger than that of any tokenizer here.
ROWS = 512

SPELLINGS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "characters": lambda: characters(WIDE_CHARACTERS),
    "byte-pairs": lambda: byte_pairs(TEXT),
    "pieces": lambda: pieces(["The", "quick", "brown", "fox", "over", "the", "lazy", "dog", "and", "went", "home"]),
}
PAIRS = list(itertools.permutations(SPELLINGS, 2))
spelling = functools.cache(lambda name: SPELLINGS[name]())


@functools.cache
def knows(name: str, text: str) -> LM:
    return learnt(spelling(name), text)


@functools.cache
def unlearnt(tokenizer: PreTrainedTokenizerFast | None) -> LM:
    """Return a small model of random weights."""
    return LM(small(vocab_size=ROWS).model, tokenizer, name="unlearnt")


def context(tokens: Sequence[int], sampling: Sampling = Sampling()) -> Context:
    return Context(tokens, ROWS, sampling, Rng(0))


def decode(target: LM, draft: LM, text: str, beginning: str) -> tuple[Generation, list[int]]:
    """Decode a text with the draft. Return the result, and transformers' output without a draft."""
    prompt = target.encode(beginning)
    length = len(target.encode(text)) - len(prompt)
    drafter = UniversalDrafter(target, draft)
    result = generate(target, prompt, drafter=drafter, max_new_tokens=length)
    return result, continuation(target.model, prompt, length)


def read_by(target: LM, draft: LM, tokens: Sequence[int]) -> list[int]:
    """Return the tokens that a draft reads when it sees a text of the target for the first time."""
    read: list[list[int]] = []

    def listen(module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        read.append(kwargs["input_ids"][0].tolist())

    with draft.model.register_forward_pre_hook(listen, with_kwargs=True):
        UniversalDrafter(target, draft).propose(context(tokens), Limit(1))
    return read[0] if read else []


# Decoding.


@pytest.mark.parametrize("text", [TEXT, WIDE])
def test_the_tokenizers_cut_a_text_differently(text: str) -> None:
    """Guards against pairs of tokenizers that are so alike that any translation would be right."""
    for one, other in PAIRS:
        ours, theirs = spelling(one), spelling(other)
        assert ours.decode(ours(text)["input_ids"], skip_special_tokens=True) == text
        assert len(ours(text)["input_ids"]) != len(theirs(text)["input_ids"])
        assert ours.get_vocab()["q"] != theirs.get_vocab()["q"]


@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_a_draft_that_knows_the_text_is_accepted(target: str, draft: str) -> None:
    """Guards against proposals that are never accepted: with spaces lost or doubled, words split differently from the
    target, or a text continued at the wrong place.
    """
    result, expected = decode(knows(target, TEXT), knows(draft, TEXT), TEXT, BEGINNING)
    assert result.tokens == expected
    assert result.draft_forwards > 0
    # A target of characters stops inside words, and the draft has learnt only whole words.
    assert result.acceptance_rate > (0.2 if target == "characters" else 0.5)
    assert max(step.accepted for step in result.steps) == 5


def test_whole_characters_behind_broken_ones_are_read() -> None:
    """Guards against a draft that reads only replacement characters: a decoder with byte fallback replaces all bytes in
    a row.
    """
    target, draft = unlearnt(spelling("pieces")), unlearnt(spelling("byte-pairs"))
    broken = target.tokenizer.convert_tokens_to_ids("<0xE4>")
    tokens = [*target.encode("The 你好"), broken, *target.encode("世界")[2:]]
    assert draft.decode(read_by(target, draft, tokens)) == "The 你好\N{REPLACEMENT CHARACTER}世界"
    assert draft.decode(read_by(target, draft, tokens[:-1])) == "The 你好\N{REPLACEMENT CHARACTER}世"


@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_a_draft_that_knows_another_text_costs_no_token(target: str, draft: str) -> None:
    """Guards against rejected proposals that affect later steps."""
    result, expected = decode(knows(target, TEXT), knows(draft, ELSEWHERE), TEXT, BEGINNING)
    assert result.tokens == expected
    assert result.accepted > 0
    assert any(step.accepted < step.drafted for step in result.steps)


@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_characters_of_many_bytes_are_carried_over(target: str, draft: str) -> None:
    """Guards against halves of characters, on either side."""
    result, expected = decode(knows(target, WIDE), knows(draft, WIDE), WIDE, WIDE[:8])
    assert result.tokens == expected
    assert result.acceptance_rate > 0.5


def test_the_distribution_is_that_of_plain_sampling(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    """Guards against proposals that depend on the randomness of the acceptance, or carry a distribution of their own.
    The test enumerates all branches: every proposal is accepted on some and rejected on others.
    """
    target, sampling, length = knows("byte-pairs", TEXT), Sampling(6.0, top_k=2), 5
    prompt = target.encode(BEGINNING)
    drafter = UniversalDrafter(target, knows("characters", TEXT))
    accepted: list[int] = []

    def run(rng: BranchRng) -> tuple[int, ...]:
        monkeypatch.setattr(Sampling, "rng", lambda self, *ranks: rng)
        result = generate(target, prompt, drafter=drafter, sampling=sampling, max_new_tokens=length)
        accepted.append(result.steps[1].accepted)
        assert len(accepted) < 200  # a draft that drew at random would add branches without end
        return tuple(result.tokens)

    distribution = distribution_of(run)
    assert set(accepted) == {0, 1, 2, 3}
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        expected = {
            (*text, token): weight * p
            for text, weight in expected.items()
            for token, p in enumerate(sampling.probs(logits(target.model, [*prompt, *text])[-1]).tolist())
            if p > 0
        }
    assert distribution.keys() == expected.keys()
    assert distribution == pytest.approx(expected, abs=1e-9)
    assert max(distribution.values()) < 0.9


def test_models_with_a_tokenizer_meet_this_drafter_in_every_suite() -> None:
    """Guards against a drafter that discovery silently skips."""
    assert examples("universal", lm("llama"))
    assert not examples("universal", small())


# Proposals.


@pytest.mark.parametrize(("target", "draft"), PAIRS)
@given(data=st.data())
@settings(max_examples=10)
def test_a_used_drafter_proposes_what_a_fresh_one_would(target: str, draft: str, data: st.DataObject) -> None:
    """Guards against a cached translation of another text, a draft length that depends on earlier calls, and random
    draws in the draft. The tokens include halves of characters, special tokens, and tokens without text.
    """
    policy = data.draw(st.sampled_from([KeepAll(), SinkWindow(13, sinks=2, interval=4)]))
    make = functools.partial(UniversalDrafter, unlearnt(spelling(target)), knows(draft, WIDE), policy)
    used = make()
    tokens_of_texts = st.sampled_from([TEXT, WIDE, "\N{REPLACEMENT CHARACTER}"]).flatmap(
        lambda text: st.slices(len(text)).map(lambda part: spelling(target)(text[part])["input_ids"])
    )
    tokens_of_any_kind = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=6)
    new = st.one_of(tokens_of_any_kind, tokens_of_texts)
    tokens = [5, *data.draw(new)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(universal, "_BLOCK_TOKENS", data.draw(st.sampled_from([4, 7, 256])))
        for _ in range(4):
            limit = Limit(data.draw(st.integers(1, 6)), data.draw(st.sampled_from([2, 64])))
            sampling = data.draw(st.sampled_from([Sampling(), Sampling(9.0)]))
            before = list(tokens)
            proposed = used.propose(context(tokens, sampling), limit)
            assert tokens == before
            assert proposed.tokens.tolist() == make().propose(context(tokens), limit).tokens.tolist()
            assert proposed.probs is None
            assert proposed.depth == len(proposed) <= min(limit.depth, limit.nodes)
            change = data.draw(st.sampled_from(["accept", "accept", "go elsewhere", "cut"]))
            if change == "cut":
                del tokens[data.draw(st.integers(1, len(tokens))) :]
            else:
                accepted = proposed.tokens.tolist() if change == "accept" else []
                tokens += [*accepted[: data.draw(st.integers(0, len(accepted)))], *data.draw(new)]


@pytest.mark.parametrize("text", [TEXT, WIDE])
@pytest.mark.parametrize("target", ["byte-pairs", "pieces"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_limit_counts_tokens_of_the_target(target: str, text: str, depth: int) -> None:
    """Guards against a draft that writes the limit in its own tokens, or more than is useful, and against steps without
    a proposal where the context ends inside a character: here every place allows one.
    """
    drafter = UniversalDrafter(unlearnt(spelling(target)), knows("characters", text))
    tokens = spelling(target)(text)["input_ids"]
    proposed, most = 0, 0
    for place in range(len(spelling(target)(text[:12])["input_ids"]), len(tokens) - depth):
        tree = drafter.propose(context(tokens[:place]), Limit(depth))
        # Where the draft stops inside a word, the last token differs from the word's own.
        assert tree.tokens.tolist()[:-1] == tokens[place : place + len(tree) - 1]
        proposed, most = proposed + len(tree), most + depth
    assert 0.8 * most < proposed <= most
    forwards = depth * max(len(text) / len(tokens), 1.0)
    assert drafter.forwards < 3 * forwards * most / depth


@pytest.mark.parametrize("target", ["byte-pairs", "pieces"])
def test_nothing_is_proposed_that_a_begun_character_rules_out(target: str) -> None:
    """Guards against a proposal whose bytes contradict the committed ones."""
    drafter = UniversalDrafter(unlearnt(spelling(target)), knows("characters", WIDE))
    tokens = spelling(target)("Un caf" + "é")["input_ids"]
    other = spelling(target)("世")["input_ids"][-3]
    assert drafter.propose(context(tokens[:-2]), Limit(3)).tokens.tolist()[:2] == tokens[-2:]
    assert drafter.propose(context(tokens[:-1]), Limit(3)).tokens.tolist()[:1] == tokens[-1:]
    assert len(drafter.propose(context([*tokens[:-2], other]), Limit(3))) == 0


@pytest.mark.parametrize("depth", [2, 4])
def test_half_a_character_of_the_draft_is_not_proposed(depth: int) -> None:
    """Guards against proposing the replacement character for a character that the draft has not finished, and against
    losing whole characters with it.
    """
    target = spelling("characters")
    for draft in ("byte-pairs", "pieces"):
        drafter = UniversalDrafter(unlearnt(target), knows(draft, WIDE))
        for place in range(2, len(WIDE) - 4):
            tree = drafter.propose(context(target(WIDE[:place])["input_ids"]), Limit(depth))
            # The target's first token stands for unknown text.
            assert 0 not in tree.tokens
            assert len(tree) > 0 or WIDE[place] not in "你好世界"


@pytest.mark.parametrize(("depth", "expected"), [(1, "a"), (4, "abc")])
def test_no_token_is_proposed_for_which_the_target_has_no_row(depth: int, expected: str) -> None:
    """Guards against an index error inside a target whose tokenizer has more tokens than its embedding, and against a
    lost proposal where the limit comes before such a token.
    """
    tokenizer = characters([*CHARACTERS, "é"])
    target = LM(build(ARCHITECTURES["llama"] | {"vocab_size": len(CHARACTERS)}), tokenizer)
    drafter = UniversalDrafter(target, learnt(byte_pairs("abcé"), "abcé" * 4))
    seen = Context(tokenizer("abcéabcé")["input_ids"], target.vocab_size, Sampling(), Rng(0))
    assert tokenizer.decode(drafter.propose(seen, Limit(depth)).tokens) == expected


def test_what_has_no_text_is_not_drafted() -> None:
    """Guards against drafting the padding rows of the draft's vocabulary: random rows would be its choice at four of
    five places.
    """
    target = spelling("byte-pairs")
    drafter = UniversalDrafter(unlearnt(target), unlearnt(spelling("characters")))
    for place in range(1, 20):
        assert len(drafter.propose(context(target(TEXT)["input_ids"][:place]), Limit(4))) > 1


@pytest.mark.parametrize(("target", "draft"), PAIRS)
@pytest.mark.parametrize("text", [TEXT, WIDE])
def test_every_block_of_the_text_is_carried_over_once(
    monkeypatch: pytest.MonkeyPatch, target: str, draft: str, text: str
) -> None:
    """Guards against spaces and characters that are lost, doubled or halved where a block ends."""
    model = unlearnt(spelling(draft))
    for block in (4, 5, 6, 256):
        monkeypatch.setattr(universal, "_BLOCK_TOKENS", block)
        read = read_by(unlearnt(spelling(target)), model, spelling(target)(text)["input_ids"])
        assert spelling(draft).decode(read, skip_special_tokens=True) == text
    assert read == spelling(draft)(text)["input_ids"]


def test_a_draft_reads_a_text_once() -> None:
    """Guards against a draft that reads the whole text again at every step: the tokens are the same, and the speed is
    lost.
    """
    target, draft, rows = knows("byte-pairs", TEXT), knows("characters", TEXT), []

    def listen(module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        rows.append(kwargs["input_ids"].shape[1])

    with draft.model.register_forward_pre_hook(listen, with_kwargs=True):
        result, _ = decode(target, draft, TEXT, BEGINNING)
    assert len(rows) == result.draft_forwards
    # The draft first reads after the target's first token.
    assert rows[0] == len(BEGINNING + target.tokenizer.decode(result.tokens[:1]))
    # The target's longest token has this many characters.
    assert max(rows[1:]) <= 8


def test_the_draft_has_room_for_the_whole_text() -> None:
    """Guards against a draft whose slots grow during a text, because its own tokens are more than the target's."""
    target = knows("byte-pairs", TEXT)
    drafter, tokens = UniversalDrafter(target, knows("characters", TEXT)), target.encode(BEGINNING)
    limited = Context(tokens, ROWS, Sampling(), Rng(0), length_limit=100 * len(tokens))
    drafter.propose(limited, Limit(3))
    assert drafter._drafter._slots.capacity >= 100 * len(BEGINNING) > 100 * len(tokens)


def test_a_drafter_that_goes_takes_its_cache_along() -> None:
    """Guards against the draft's keys of one prompt after another that wait for a collection of garbage."""
    drafter = UniversalDrafter(knows("byte-pairs", TEXT), knows("characters", TEXT))
    drafter.propose(context(knows("byte-pairs", TEXT).encode(BEGINNING)), Limit(3))
    slots = weakref.ref(drafter._drafter._slots)
    gc.disable()
    try:
        del drafter
        assert slots() is None
    finally:
        gc.enable()


# Special tokens.

END = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Both have a token of this name.
        ("<|user|>Hi<|pad|>", "<|user|>Hi<|pad|>"),
        # The target's end of text becomes the draft's.
        ("Hi<|end|>Ho", "Hi</s>Ho"),
        # The draft has no token of this name, so it is read as text.
        ("<|tool|>Hi", "<|tool|>Hi"),
    ],
)
def test_special_tokens_go_by_their_names(text: str, expected: str) -> None:
    """Guards against roles of a conversation that are dropped, and a text's end that the draft does not recognise."""
    ours, theirs = byte_pairs(TEXT, special=END), pieces(["Hi"])
    ours.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|tool|>"]})
    theirs.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|pad|>"]})
    tokens = ours(text)["input_ids"]
    assert len(tokens) < 6
    assert read_by(unlearnt(ours), unlearnt(theirs), tokens) == theirs(expected)["input_ids"]


def test_each_side_begins_a_text_in_its_own_way() -> None:
    """Guards against the name of a special token read as text, and a draft without its own start token."""
    opens, plain = unlearnt(spelling("pieces")), unlearnt(spelling("byte-pairs"))
    opened, other = opens.encode("The fox"), plain.encode("The fox")
    assert opened[0] == opens.tokenizer.bos_token_id
    assert read_by(opens, plain, opened) == read_by(opens, plain, opened[1:]) == other
    assert read_by(plain, opens, other) == opened
    # A chat template may write the start token inside a text.
    assert plain.tokenizer.decode(read_by(opens, plain, [*opened, *opened])).startswith("The fox<s>")
    # The text is still empty, but one draft reads its start token.
    assert read_by(opens, plain, opened[:1]) == []
    assert read_by(opens, unlearnt(spelling("pieces")), opened[:1]) == opened[:1]


def test_the_end_of_a_text_is_proposed() -> None:
    """Guards against a draft's end of text proposed as its characters."""
    ours, theirs = byte_pairs(TEXT, special=END), pieces(["The", "fox"])
    drafter = UniversalDrafter(unlearnt(ours), learnt(theirs, "The fox is home.</s>"))
    tree = drafter.propose(context(ours("The fox is home")["input_ids"]), Limit(2))
    assert tree.tokens.tolist() == [ours.get_vocab()["."], ours.eos_token_id]


def test_spaces_before_marks_stay() -> None:
    """Guards against transformers' clean-up of decoded text, which a tokenizer may ask for."""
    ours = characters()
    ours.clean_up_tokenization_spaces = True
    text = "It 's here , is n't it ?"
    assert ours.decode(ours(text)["input_ids"]) != text
    draft = unlearnt(spelling("byte-pairs"))
    assert read_by(unlearnt(ours), draft, ours(text)["input_ids"]) == draft.encode(text)


# Refusals.


def lower_case() -> PreTrainedTokenizerFast:
    tokenizer = characters()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "sentence"),
    [
        (None, "unlearnt has no tokenizer, but models of different vocabularies can exchange only text: load it with"),
        (lower_case(), "its tokenizer returns \"it 's  a b ,\\\\nis n't it \\?\" for \"It 's  A B"),
        (characters(["?", "a", "b"]), "its tokenizer returns"),
    ],
    ids=["none", "lower-case", "few characters"],
)
def test_a_tokenizer_that_loses_text_is_refused(tokenizer: PreTrainedTokenizerFast | None, sentence: str) -> None:
    """Guards against a draft that costs time and is never right."""
    useless, good = unlearnt(tokenizer), unlearnt(spelling("byte-pairs"))
    for target, draft in ((useless, good), (good, useless)):
        with pytest.raises(TokenizerMismatchError, match=sentence):
            UniversalDrafter(target, draft)


def test_a_text_longer_than_the_draft_s_context_is_decoded_all_the_same() -> None:
    """Guards against an error where the context of a draft with many short tokens ends before the target's."""
    target = knows("byte-pairs", TEXT)
    draft = LM(build(ARCHITECTURES["gpt-2"] | {"n_positions": 32, "vocab_size": ROWS}), spelling("characters"))
    result, expected = decode(target, draft, TEXT, BEGINNING)
    assert result.tokens == expected
    assert result.steps[1].drafted > 0
    assert result.steps[-2].drafted == 0
