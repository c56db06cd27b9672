"""A tokenizer as CM3leon's and Chameleon's are: text, image codes and marks in one order of ids."""

import json
import random
from typing import Any

from megatron_jam.tokenizers.named import image_token_name
from tests.helpers.pico import pico_tokenizer


def mixed_tokenizer(*, codes: int, marks: str, seed: int) -> tuple[dict[str, Any], list[str]]:
    """The content of a tokenizer.json whose text is `pico_tokenizer`'s, and its names by id.

    Behind `<s> <pad> </s> <unk>` stand the image codes in any order, `<eoss>`, `<racm3:break>`,
    four sentinels ("sentinel") or reserved tokens as Chameleon's ("reserved"), and text.
    """
    content = json.loads(pico_tokenizer().as_json())
    pieces = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    image = [image_token_name(code) for code in range(codes)]
    random.Random(seed).shuffle(image)
    if marks == "sentinel":
        others = [f"<sentinel:{number}>" for number in range(4)]
    else:
        others = [f"<reserved0{8194 + number}>" for number in range(4)]
        others += ["<reserved08706>", "<image>"]
    special = ["<eoss>", "<racm3:break>", *others]
    names = [*pieces[:4], *image, *special, *pieces[4:]]
    ids = {name: number for number, name in enumerate(names)}
    content["model"]["vocab"] = ids
    content["added_tokens"] = [
        {
            "id": ids[name],
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for name in [*pieces[:4], *special]
    ]
    return content, names
