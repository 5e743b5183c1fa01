"""Tokenizers of a few words, made here: of pieces that go on (``##``), and of bytes with a mark for blanks."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PIECES = ["[PAD]", "[UNK]", "the", "un", "##like", "##ly", "end", "<b>", "&", "."]


def of_pieces() -> PreTrainedTokenizerFast:
    """As BERT's: words are parted at blanks, and pieces that go on are marked."""
    made = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


def of_bytes() -> PreTrainedTokenizerFast:
    """As GPT-2's: a blank belongs to the word after it."""
    pieces = ["<s>", *pre_tokenizers.ByteLevel.alphabet(), "Ġt", "he", "Ġthe", "ly"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.BPE(vocabulary, [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("l", "y")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
