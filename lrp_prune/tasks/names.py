"""First names that many tokenizers have as one token; each task keeps those that its tokenizer does."""

FEMALE: tuple[str, ...] = tuple(
    """
    Mary Anna Emma Sarah Lisa Laura Julia Alice Rachel Jessica Amy Kate Jane Jennifer Michelle Elizabeth Maria Helen
    Susan Linda Karen Nancy Emily Amanda Melissa Rebecca Christine Diana Victoria Caroline Claire Grace Lucy Rose
    Ann Anne Barbara Beth Betty Carol Catherine Cindy Dorothy Ellen Elena Eva Fiona Frances Hannah Heather Irene Jean
    Joan Judith Judy Julie Katherine Kathleen Kelly Leah Lily Lynn Margaret Marie Martha Molly Monica Natalie Nicole
    Olivia Pamela Patricia Paula Ruth Sandra Sara Sharon Sophia Sophie Stephanie Tara Teresa Tina Vanessa Wendy Zoe
    """.split()
)
MALE: tuple[str, ...] = tuple(
    """
    John James Robert Michael David Richard Joseph Thomas Charles Daniel Matthew Mark Paul Steven Andrew Kevin Brian
    George Edward Peter Jack Henry Adam Frank Scott Eric Stephen Jason Ryan Justin Tom Tim Simon Martin Alex
    Aaron Alan Albert Alfred Allen Anthony Arthur Ben Benjamin Bob Bruce Carl Chris Craig Dave Dennis Derek Donald
    Doug Ernest Felix Fred Gary Gerald Gordon Graham Greg Harold Harry Howard Hugh Ian Jeff Jerry Jim Joe Jonathan
    Josh Keith Ken Kyle Larry Leo Louis Luke Max Mike Nathan Neil Nick Oliver Oscar Patrick Phil Philip Ralph Ray Roger
    Ron Roy Sam Samuel Sean Stanley Steve Ted Terry Tony Victor Vincent Walter Wayne William
    """.split()
)
