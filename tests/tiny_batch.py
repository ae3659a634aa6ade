"""Compares the rows of a batch with the answers of each row alone."""


def assert_rows_are_answers(model, queries: list, images: list, *, max_new_tokens: int = 3) -> None:
    """Asserts that `generate` gives each row the ids and the number of prompt tokens of `chat`."""
    answers = model.generate(queries, images, max_new_tokens=max_new_tokens)
    for query, image, answer in zip(queries, images, answers, strict=True):
        alone = model.chat(query, image, max_new_tokens=max_new_tokens)
        assert (answer.ids, answer.num_prompt_tokens) == (alone.ids, alone.num_prompt_tokens)
