"""The formats of Vary's training records."""

from mindvlm.processing.samples.record_formats import RecordFormat

RECORD_FORMATS = {
    # conversations
    "vary": RecordFormat(),
    # captions of the data set of that name
    "vary_tiny_600k": RecordFormat(question="question", answer="caption", line_break="<lb>"),
}
