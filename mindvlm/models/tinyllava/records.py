"""The format of LLaVA's training records, which TinyLLaVA uses."""

from mindvlm.processing.samples.record_formats import RecordFormat

RECORD_FORMATS = {"llava": RecordFormat(follows_llava=True)}
