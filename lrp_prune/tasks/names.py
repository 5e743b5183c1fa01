"""First names that many tokenizers have as one token; each task keeps those that its tokenizer does."""

FEMALE: tuple[str, ...] = tuple(
    """
    Mary Anna Emma Sarah Lisa Laura Julia Alice Rachel Jessica Amy Kate Jane Jennifer Michelle Elizabeth Maria Helen
    Susan Linda Karen Nancy Emily Amanda Melissa Rebecca Christine Diana Victoria Caroline Claire Grace Lucy Rose
    """.split()
)
MALE: tuple[str, ...] = tuple(
    """
    John James Robert Michael David Richard Joseph Thomas Charles Daniel Matthew Mark Paul Steven Andrew Kevin Brian
    George Edward Peter Jack Henry Adam Frank Scott Eric Stephen Jason Ryan Justin Tom Tim Simon Martin Alex
    """.split()
)
