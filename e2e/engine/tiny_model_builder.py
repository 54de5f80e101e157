"""Writes the tiny model to the directory named on the command line. Runs inside the engine environment only.

A Llama with random weights and a tokenizer whose tokens are bytes: no download, a few megabytes, and yet every part
of the engine works as with a large model. Three choices make it useful for tests:

* weights are drawn with a standard deviation of 0.12 instead of 0.02; with less, greedy decoding repeats one token
  for ever, and a test that compares two answers would prove nothing;
* the rows of the output layer that belong to printable ASCII are random, all others zero, so that the answer can be
  read, each token is one character, and the model does not end an answer by itself;
* one token costs a few milliseconds on one core, so that latency objectives of the demo are of a realistic order.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # type: ignore[import-not-found]
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # type: ignore[import-not-found]

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
PRINTABLE = range(0x20, 0x7F)
"""Bytes that the model answers with."""
LOGIT_SCALE = 3.0
"""How far printable tokens stand out when sampling at temperature 1."""


def build(directory: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: token for token, character in enumerate(alphabet)}
    bos, eos = "<s>", "</s>"
    vocabulary |= {bos: len(alphabet), eos: len(alphabet) + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(directory)

    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16384,
            initializer_range=0.12,
            bos_token_id=vocabulary[bos],
            eos_token_id=vocabulary[eos],
        )
    )
    printable = [tokenizer.encode(chr(byte)).ids[0] for byte in PRINTABLE]
    with torch.no_grad():
        rows = model.lm_head.weight[printable] * LOGIT_SCALE
        model.lm_head.weight.zero_()
        model.lm_head.weight[printable] = rows
    model.to(torch.bfloat16).save_pretrained(directory)
    for file in directory.iterdir():
        # The engine in a pod is another user.
        file.chmod(0o644)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
