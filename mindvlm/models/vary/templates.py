"""The chat templates of Vary, under the names of the original program."""

from mindvlm.processing.text.chat_template import CHATML, ChatTemplate

_HUMAN_ASSISTANT = {
    "style": "colon_single",
    "roles": ("Human", "Assistant"),
    "separator": "###",
    "answer_separator": "###",
    "system_joint": "\n",
}
_CAPTION = {
    "style": "caption",
    "roles": ("", ""),
    "separator": "",
    "answer_separator": "</s>",
    "answer_joint": "\n",
}
_USER_ASSISTANT = {
    "style": "colon_pair",
    "roles": ("USER", "ASSISTANT"),
    "separator": " ",
    "answer_separator": "</s>",
}

_DETAILED = "You should follow the instructions carefully and explain your answers in detail."
_CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_VARY_ASSISTANT = (
    "You are vary, a large language and vision assistant trained by Foundation Model Group, Megvii Technology."
    "You are able to understand the visual content that the user provides, and assist the user with a variety of tasks "
    "using natural language.Follow the instructions carefully and explain your answers in detail."
)
_VARY_TEXT_ASSISTANT = (
    "You are vary, a large language model trained by Foundation Model Group, Megvii Technology."
    "You are designed to assist human with a variety of tasks using natural language."
    "Follow the instructions carefully."
)
_VARY_LIST = (
    "- You are vary, a large language and vision assistant trained by Foundation Model Group, Megvii Technology.\n"
    "- You are able to understand the visual content that the user provides, and assist the user with a variety of "
    "tasks using natural language.\n"
    "- You should follow the instructions carefully and explain your answers in detail."
)
_MOSAIC_LIST = (
    "- You are a helpful assistant chatbot trained by MosaicML.\n"
    "- You answer questions.\n"
    "- You are excited to be able to help the user, but will refuse to do anything that could be considered harmful to "
    "the user.\n"
    "- You are more than just an information source, you are also able to write poetry, short stories, and make jokes."
)

TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatTemplate("mpt", system=_DETAILED, **CHATML),
        ChatTemplate("qwen", system=_DETAILED, **CHATML),
        ChatTemplate("mpt_eval", system="", **CHATML),
        ChatTemplate("mpt_text", system=_MOSAIC_LIST, **CHATML),
        ChatTemplate("mpt_multimodal", system=_VARY_LIST, **CHATML),
        ChatTemplate("v1", system=_CURIOUS_USER, **_USER_ASSISTANT),
        ChatTemplate("vicuna_v1_1", system=_CURIOUS_USER, **_USER_ASSISTANT),
        ChatTemplate("baichuan", system=_CURIOUS_USER, **_USER_ASSISTANT),
        ChatTemplate("llava_v1", system=_VARY_ASSISTANT, **_USER_ASSISTANT),
        ChatTemplate("bair_v1", system="BEGINNING OF CONVERSATION:", **{**_USER_ASSISTANT, "roles": ("USER", "GPT")}),
        ChatTemplate("default", system=_VARY_ASSISTANT, **_HUMAN_ASSISTANT),
        ChatTemplate("simple", system="", **_HUMAN_ASSISTANT),
        ChatTemplate("multimodal", system="", **_HUMAN_ASSISTANT),
        ChatTemplate("simple_legacy", system=_VARY_TEXT_ASSISTANT, **_HUMAN_ASSISTANT),
        ChatTemplate("opt", system="", **_CAPTION),
    )
}
