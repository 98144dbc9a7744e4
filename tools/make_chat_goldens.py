#!/usr/bin/env python3
"""Makes tests/data/text/chat.json: what HF transformers renders from the published chat templates, one file a style in a folder.

The folder holds deepseek-v2.jinja, llama3.jinja and so on: the `chat_template` of the tokenizer_config.json of a model of that family;
SmolLM2's comes from its GGUF. The templates themselves are their models' and stay outside this repository.

usage: tools/make_chat_goldens.py FOLDER
"""
import json
import os
import pathlib
import sys

import gguf
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "mla"
ENDS = {  # bos and eos
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "llama2": ("<s>", "</s>"),
    "mistral": ("<s>", "</s>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "": ("<|endoftext|>", "<|im_end|>"),
}


def conversations():
    user = lambda text: {"role": "user", "content": text}
    assistant = lambda text: {"role": "assistant", "content": text}
    system = lambda text: {"role": "system", "content": text}
    return [
        [user("Hi")],
        [system("Be brief."), user("Hi")],
        [user("Hello"), assistant("Hi there"), user("Who are you?")],
        [system("You are a pirate.\n"), user("Hello"), assistant("  Arr!  \n"), user(" Where to?\n"), assistant("North"), user("Why?")],
        [user("日本語 😀\n\nline"), assistant("\u00a0x\u3000"), user("\t tabs \u2028")],
        [system("s"), user("<|im_end|> [/INST] </s>"), assistant("")],
        [system(""), user("")],
    ]


def main():
    (folder,) = sys.argv[1:]
    templates = {path.stem: path.read_text(encoding="utf-8") for path in sorted(pathlib.Path(folder).glob("*.jinja"))}
    fields = gguf.GGUFReader(CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf").fields
    templates["smollm2"] = fields["tokenizer.chat_template"].contents()
    cases = []
    for style, template in templates.items():
        bos, eos = next(ends for start, ends in ENDS.items() if style.startswith(start))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token=bos, eos_token=eos)
        for messages in conversations():
            for generate in (True, False):
                prompt = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=generate)
                cases.append({"style": style, "messages": messages, "generate": generate, "prompt": prompt})
    with open(ROOT / "tests/data/text/chat.json", "w", encoding="utf-8") as file:
        json.dump(cases, file, ensure_ascii=True, indent=0)
    print(f"{len(cases)} prompts of {len(templates)} styles")


main()
