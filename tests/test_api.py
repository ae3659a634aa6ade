"""The Python API on a tiny model: every call gives the same answer, and bad input gives an error."""

import numpy as np
import pytest

from mindvlm.core.errors import UserError
from mindvlm.generation.request import Slot
from tests.tiny_vary import (
    IMAGE_TOKEN_LEN,
    VOCAB_SIZE,
    picture,
    tiny_model,
)


@pytest.fixture(scope="module", params=["pynative", pytest.param("graph", marks=pytest.mark.ci)])
def model(request):
    return tiny_model(request.param)


def greedy_by_logits(model, num_tokens: int, query: str, images=None) -> list[int]:
    """Returns greedy ids from full passes without a KV cache."""
    images = [] if images is None else images if isinstance(images, list) else [images]
    ids = list(model.processor.prompt(query, num_images=len(images)).input_ids)
    features = model.encode_images(images)
    num_prompt = len(ids)
    for _ in range(num_tokens):
        logits = model.engine.logits(np.array([ids], np.int32), features)
        ids.append(int(logits[0, -1].asnumpy().argmax()))
    return ids[num_prompt:]


def test_chat_generate_and_stream_give_the_same_text(model):
    whole = model.chat("read", picture())
    stream = model.chat("read", picture(), stream=True)
    pieces = list(stream)
    assert len(pieces) > 1 and "".join(pieces) == stream.answer == whole
    assert model.generate("read", picture()) == whole
    assert model.generate(["read"], [picture()]) == [whole]
    assert "".join(model.generate("read", [picture()], stream=True)) == whole
    assert whole.ids == stream.answer.ids and stream.answer.num_prompt_tokens == whole.num_prompt_tokens


def test_an_answer_is_greedy_and_says_how_it_came_about(model):
    answer = model.chat("read", picture(), max_new_tokens=3)
    assert answer.ids == greedy_by_logits(model, 3, "read", picture())
    assert isinstance(answer, str)
    assert (answer.stop_reason, answer.num_new_tokens) == ("max_new_tokens", 3)
    assert answer.num_prompt_tokens == len(model.processor.prompt("read", num_images=1).input_ids)
    assert answer.history == [("<image>\nread", str(answer))]
    assert set(answer.seconds) == {"compile", "vision", "prefill", "decode"}
    assert answer.seconds["decode"] > 0 and answer.tokens_per_second > 0


def test_the_picture_matters(model):
    logits = [model.logits("read", image) for image in (picture(0), picture(1))]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def test_text_only(model):
    answer = model.chat("hello", max_new_tokens=3)
    assert answer.ids == greedy_by_logits(model, 3, "hello")
    assert answer.history == [("hello", str(answer))]


def test_a_batch_equals_single_answers(model):
    queries, images = ["read", "and a longer question than that", "hi"], [picture(0), [picture(1), picture(2)], None]
    answers = model.generate(queries, images, max_new_tokens=5)
    for query, image, answer in zip(queries, images, answers, strict=True):
        single = model.chat(query, image, max_new_tokens=5)
        assert (answer.ids, answer, answer.num_prompt_tokens) == (single.ids, single, single.num_prompt_tokens)
        assert answer.history == single.history


def test_each_query_is_answered_when_a_slot_is_free(model, monkeypatch, tmp_path):
    monkeypatch.setattr("mindvlm.sessions.loaded_model.MAX_SLOTS", 2)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    queries = [("read", picture(n)) for n in range(4)]
    queries += [("hello", None), ("read", tmp_path / "broken.png"), ("x" * 400, None)]
    found = dict(model.generate_each(queries, len(queries), max_new_tokens=5))
    assert found.keys() == set(range(len(queries)))
    for number, (query, image) in enumerate(queries[:5]):
        single = model.chat(query, image, max_new_tokens=5)
        assert (found[number], found[number].ids, found[number].history) == (single, single.ids, single.history)
    assert "broken.png" in str(found[5]) and "tokens but the context holds" in str(found[6])
    interrupted = model.generate_each([("hello", None), ("read", tmp_path / "broken.png")], 2, max_new_tokens=5)
    next(interrupted)
    model.chat("hello", max_new_tokens=2)
    with pytest.raises(UserError, match="interrupted by another request"):
        list(interrupted)


def test_each_query_may_have_a_history(model):
    first = model.chat("read", picture(), max_new_tokens=3)
    queries = [("and <image>?", [picture(), picture(1)], first.history), ("more", picture(), first.history)]
    found = dict(model.generate_each(queries, 2, max_new_tokens=3))
    for number, query in enumerate(queries):
        single = model.chat(*query, max_new_tokens=3)
        assert (found[number], found[number].ids, found[number].history) == (single, single.ids, single.history)


def test_the_probabilities_of_a_reply_are_those_of_its_tokens_one_by_one(model):
    reply, end = "red cat", model.processor.template.answer_separator
    record = {"image": "x", "conversations": [{"from": "human", "value": "<image>\nread"}]}
    record["conversations"].append({"from": "gpt", "value": reply})
    sample = model.processor.training_sample(record, max_length=model.engine.max_length)
    ids, learned = sample.input_ids, sample.labels >= 0
    assert ids[-1] == model.processor.tokenizer.special_ids[end]
    start, stop = learned.argmax(), len(ids) - 1
    features, expected = model.encode_images(picture()), []
    for position in range(start, stop):
        logits = model.engine.logits(ids[None, :position], features)[0, -1].asnumpy().astype(np.float64)
        expected.append(logits[ids[position]] - np.logaddexp.reduce(logits))

    logarithms, is_greedy = model.reply_probabilities("read", reply, picture())

    assert len(logarithms) > 1
    np.testing.assert_allclose(logarithms, expected, rtol=1e-4)
    assert not is_greedy


def test_the_greedy_reply_is_recognised(model):
    prompt = model.processor.prompt("read").input_ids
    likeliest = max("abcdefghij", key=lambda letter: model.reply_probabilities("read", letter)[0].sum())
    (token,) = model.processor.prompt("read", reply=likeliest).input_ids[len(prompt) :]
    (logarithm,), is_greedy = model.reply_probabilities("read", likeliest)
    assert is_greedy == (model.logits("read")[-1].argmax() == token)
    assert is_greedy == (model.chat("read", max_new_tokens=1).ids == [token])
    assert logarithm < 0


def test_each_row_of_a_batch_stops_by_itself(model, monkeypatch):
    queries = ["read", "hi"]
    free = model.generate(queries, max_new_tokens=6)
    stop_id = next(token for token in free[0].ids[1:] if token not in free[1].ids)
    num_before = free[0].ids.index(stop_id)
    monkeypatch.setattr(type(model.processor), "stop_ids", (stop_id,))
    first, second = model.generate(queries, max_new_tokens=6)
    assert (first.stop_reason, first.ids) == ("stop_token", free[0].ids[: num_before + 1])
    assert str(first) == model.processor.tokenizer.decode(first.ids[:-1], skip_special=True)
    assert (second.stop_reason, second.ids) == ("max_new_tokens", free[1].ids)


def test_a_stop_string_ends_the_answer_before_it(model):
    free = model.chat("read", max_new_tokens=8)
    mark = free[1:3]
    answer = model.chat("read", max_new_tokens=8, stop_strings=[mark])
    assert (answer.stop_reason, str(answer)) == ("stop_string", free[: free.index(mark)])
    assert len(answer.ids) < len(free.ids)


def test_a_seed_fixes_the_text(model):
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 6}
    ids = [model.chat("read", seed=seed, **options).ids for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]
    assert model.chat("read", **options).ids == model.chat("read", seed=model.config.seed, **options).ids


def test_a_stop_mark_that_is_spelled_in_letters(model, monkeypatch):
    """The model writes the closing mark as ordinary text, across tokens; the answer does not contain it."""
    ids = model.processor.tokenizer.encode("so<|im_end|> and more")
    monkeypatch.setattr(Slot, "forced_id", property(lambda slot: ids[len(slot.new_ids)]))
    stream = model.chat("read", max_new_tokens=len(ids), stream=True)
    assert list(stream) == ["s", "o"] and (stream.answer, stream.answer.stop_reason) == ("so", "stop_string")


def test_a_loop_ends_with_its_reason(model, monkeypatch):
    monkeypatch.setattr(Slot, "forced_id", property(lambda slot: 65 + len(slot.new_ids) % 3))
    answer = model.chat("read", max_new_tokens=60, max_repeated_tokens=30)
    assert (answer.stop_reason, answer.num_new_tokens) == ("repetition", 30)
    assert model.chat("read", max_new_tokens=60).num_new_tokens == 60


def test_nan_is_an_error_and_not_an_empty_answer(model, monkeypatch):
    encode = model.engine.encode_images
    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "encode_images", lambda *pixels: encode(*pixels) * float("nan"))
        for ask in (model.chat, lambda query, image: list(model.chat(query, image, stream=True))):
            with pytest.raises(UserError, match="logits of token 1 of the answer contain NaN.*float32.*damaged"):
                ask("read", picture(70))
        with pytest.raises(UserError, match="query 2 of 2: the logits of token 1"):
            model.generate(["hello", "read"], [None, picture(70)])
    assert model.chat("hello", max_new_tokens=3)


def test_history_and_pictures_of_later_turns(model):
    first = model.chat("hello", max_new_tokens=4)
    second = model.chat("and this?", picture(), history=first.history, max_new_tokens=4)
    assert second.history == [*first.history, ("<image>\nand this?", str(second))]
    third = model.chat("compare", [picture(), picture(1)], history=second.history, max_new_tokens=4)
    prompt = model.processor.prompt("compare", num_images=2, history=second.history)
    assert third.num_prompt_tokens == len(prompt.input_ids)
    assert len(prompt.placeholder_starts) == 2
    features = model.encode_images([picture(), picture(1)])
    logits = model.engine.logits(np.array([prompt.input_ids], np.int32), features)
    assert third.ids[0] == logits[0, -1].asnumpy().argmax()


def test_logits_have_a_row_for_every_position(model):
    logits = model.logits("read", picture())
    length = len(model.processor.prompt("read", num_images=1).input_ids)
    assert logits.shape == (length, VOCAB_SIZE) and logits.dtype == np.float32
    assert logits[-1].argmax() == model.chat("read", picture(), max_new_tokens=1).ids[0]


def test_encoded_pictures_are_kept(model, monkeypatch):
    model.encoder.cache.clear()
    calls = []
    encode = model.engine.encode_images
    monkeypatch.setattr(model.engine, "encode_images", lambda *pixels: calls.append(1) or encode(*pixels))
    both = model.encode_images([picture(0), picture(1)])
    assert both.shape == (2, IMAGE_TOKEN_LEN, 32) and len(calls) == 2
    np.testing.assert_array_equal(model.encode_images(picture(1)).asnumpy()[0], both.asnumpy()[1])
    assert len(calls) == 2
    assert model.encode_images([]) is None and model.encode_images(None) is None
    monkeypatch.setattr("mindvlm.generation.images.MAX_CACHED_VIEWS", 2)
    model.encode_images(picture(2))
    model.encode_images(picture(1))
    assert len(calls) == 3
    model.encode_images(picture(0))
    assert len(calls) == 4 and len(model.encoder.cache) == 2


def test_a_picture_may_be_a_path_or_an_array(model, tmp_path):
    picture().save(tmp_path / "page.png")
    expected = model.encode_images(picture()).asnumpy()
    for source in (tmp_path / "page.png", str(tmp_path / "page.png"), np.asarray(picture())):
        np.testing.assert_array_equal(model.encode_images([source]).asnumpy(), expected)


@pytest.mark.parametrize(
    "query, count, history, expected",
    [
        ("<image> and <image>", 1, None, "1 image for 2 <image> markers"),
        ("<image>", 2, None, "2 images for 1 <image> marker"),
        ("what?", 1, [("<image> <image>", "x")], "1 image for 2 <image> markers in the history"),
    ],
)
def test_pictures_and_markers_must_agree(model, query, count, history, expected):
    with pytest.raises(UserError, match=expected):
        model.chat(query, [picture()] * count, history=history)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"max_tokens": 3}, "unknown argument 'max_tokens'; did you mean 'max_new_tokens'"),
        ({"image": "page.png"}, "unknown argument 'image'; did you mean 'images'"),
        ({"zzz": 1}, "known arguments: do_sample, images, "),
        ({"max_new_tokens": "3"}, "'generation.max_new_tokens' is '3'; expected a whole number"),
        ({"stop_strings": "###"}, "'generation.stop_strings' is '###'; expected a list"),
        ({"temperature": 0}, "generation.temperature is 0"),
        ({"top_p": 2}, "generation.top_p is 2"),
    ],
)
@pytest.mark.parametrize("method", ["chat", "generate", "batch"])
def test_bad_generation_options(model, method, options, expected):
    with pytest.raises(UserError, match=expected):
        if method == "batch":
            model.generate(["a", "b"], **options)
        else:
            getattr(model, method)("a", **options)


def test_bad_batches(model):
    with pytest.raises(UserError, match="1 image entries for 2 queries"):
        model.generate(["a", "b"], [picture()])
    with pytest.raises(UserError, match="one entry per query"):
        model.generate(["a", "b"], picture())
    with pytest.raises(UserError, match="0 queries"):
        model.generate([])
    with pytest.raises(UserError, match="stream=True supports one query only"):
        model.generate(["a"], stream=True)


def test_a_prompt_longer_than_the_context(model):
    for ask in (lambda: model.chat("x" * 400), lambda: model.generate(["a", "x" * 400])):
        with pytest.raises(UserError, match=r"the prompt has 4\d\d tokens but the context holds 320"):
            ask()
    assert model.chat("hello", max_new_tokens=3).ids == greedy_by_logits(model, 3, "hello")


def test_a_closed_stream_keeps_what_came(model):
    whole = model.chat("read")
    stream = model.chat("read", stream=True)
    piece = next(stream)
    answer = stream.close()
    assert answer.stop_reason == "interrupted" and answer.startswith(piece) and whole.startswith(answer)
    assert stream.answer is answer


def test_two_streams_do_not_mix(model):
    first = model.chat("read", stream=True)
    next(first)
    other = model.chat("something else")
    with pytest.raises(UserError, match="interrupted by another request to the model"):
        next(first)
    assert model.chat("something else") == other


def test_options_of_drawing_without_drawing_are_warned_of_once(model):
    with pytest.warns(UserWarning, match="top_p without effect: do_sample is false") as caught:
        model.chat("hello", top_p=0.5, max_new_tokens=1)
    assert len(caught) == 1


def test_a_picture_is_decoded_once(model, monkeypatch):
    decoded, pixels = [], model.processor.pixels
    monkeypatch.setattr(model.processor, "pixels", lambda image: decoded.append(image) or pixels(image))
    model.chat("read", picture(), max_new_tokens=1)
    model.generate(["read", "hi"], [picture(), None], max_new_tokens=1)
    model.logits("read", picture())
    assert len(decoded) == 3


def test_a_batch_of_more_queries_than_slots(model, monkeypatch):
    monkeypatch.setattr("mindvlm.sessions.loaded_model.MAX_SLOTS", 2)
    queries = ["read", "a longer question", "hi", "x", "and the last one"]
    answers = model.generate(queries, max_new_tokens=3)
    assert len(model.engine.slots) == 2
    assert [answer.ids for answer in answers] == [model.chat(query, max_new_tokens=3).ids for query in queries]


def test_rows_of_a_batch_draw_with_seeds_of_their_own(model):
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 6}
    for images in ([None] * 3, [picture(), None, picture(1)]):
        answers = model.generate(["read"] * 3, images, seed=7, **options)
        single = [model.chat("read", image, seed=7 + n, **options).ids for n, image in enumerate(images)]
        assert [answer.ids for answer in answers] == single
    assert len({tuple(answer.ids) for answer in answers}) > 1


def test_features_that_depend_on_the_question(model, monkeypatch):
    """A family may choose rows by the question, so that their number is known after encoding only."""
    placeholder = model.engine.placeholder_id
    seen = []

    def first_rows(features, layout, context):
        seen.append(list(context))
        return features.reshape((-1, features.shape[-1]))[: 3 if len(context) > 30 else 5]

    monkeypatch.setattr(model.model, "picture_rows", first_rows)
    for query, count in (("read", 5), ("read all that is written on this page", 3)):
        answer = model.chat(query, picture(), max_new_tokens=2)
        prompt = model.processor.prompt(query, num_images=1, image_lengths=[count])
        assert prompt.input_ids.count(placeholder) == count and answer.num_prompt_tokens == len(prompt.input_ids)
        assert seen[-1] == [token for token in prompt.input_ids if token != placeholder]
        features = model.encode_images(picture())[0, :count]
        logits = model.engine.logits(np.array([prompt.input_ids], np.int32), features)
        assert answer.ids[0] == logits[0, -1].asnumpy().argmax()
