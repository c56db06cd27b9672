"""A page of samples says what training is given."""

import re

import numpy as np
import torch

from megatron_jam.data.loader import collate
from megatron_jam.data.sample import Block, Sample
from megatron_jam.data.showing import Shower, write_page
from megatron_jam.tokenizers.vq import VqConfig, VqTokenizer
from tests.data.prepare.small import NUM_CODES, text_tools


def test_rows_of_the_page_are_the_batch(tmp_path):
    tools = text_tools()
    vocabulary, tokenizer = tools["vocabulary"], tools["tokenizer"]
    config = VqConfig(image_size=8, patch_size=4, channels=(8,), num_codes=NUM_CODES, code_dim=4)
    images = VqTokenizer(config)
    picture = vocabulary.image_id([1, 2, 3, 4])
    documents = [
        np.array(
            [
                vocabulary.eos,
                *tokenizer.encode("a <b>"),
                vocabulary.break_,
                *picture,
                vocabulary.eos,
            ]
        ),
        np.array([vocabulary.sentinel(0), *picture[:2], vocabulary.eoss]),
    ]
    sizes = [*map(len, documents), 21 - sum(map(len, documents))]
    tokens = np.concatenate([*documents, [vocabulary.pad] * sizes[-1]]).astype(np.int32)
    block = Block.of(tokens, np.repeat(np.arange(3, dtype=np.int32), sizes))
    sample = Sample(block, vocabulary.pad)
    shower = Shower(images=images, isolate_documents=True, **tools)
    shown = shower.show(sample, title="Sample 7: pairs")
    tokens = [token for run in shown.runs for token in run.tokens]
    batch = collate([sample], isolate_documents=True)
    assert [each.counted for each in tokens] == batch["loss_mask"][0].bool().tolist()
    assert [each.position for each in tokens] == batch["positions"][0].tolist()
    assert [each.document for each in tokens] == batch["documents"][0].tolist()
    assert [each.token for each in tokens[1:]] == [each.label for each in tokens[:-1]]
    names = ["</s>", "a", "\N{OPEN BOX}", "<", "b", ">", "<break>", "I1", "I2", "I3", "I4", "</s>"]
    assert [each.token for each in tokens[:15]] == [*names, "<sentinel:0>", "I1", "I2"]
    assert {each.modality for each in tokens[6:10]} == {"image"}
    assert "of 2 documents" in shown.facts
    assert [bool(run.picture) for run in shown.runs if run.tokens[0].kind == "image"] == [
        True,
        False,
    ]
    write_page(tmp_path / "x.html", title="t", settings="a: <1>", samples=[shown])
    page = (tmp_path / "x.html").read_text()
    rows = re.findall(
        r"<tr[^>]*><td>(\d+)</td><td class=\"\w+\">([^<]*)</td><td>([^<]*)</td><td>(yes|no)", page
    )
    assert len(rows) == 20
    assert [row[3] == "yes" for row in rows] == [each.counted for each in tokens]
    assert rows[3][1] == "&lt;"  # a text is never markup
    assert "a: &lt;1&gt;" in page
    assert page.count('<img src="data:image/png;base64,') == 1
    assert torch.equal(batch["tokens"][0], torch.from_numpy(sample.tokens.astype(np.int64)))
