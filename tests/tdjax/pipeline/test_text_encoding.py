"""The text encoder layer by layer: the bits of the whole one, few layers alive at a time, chosen by
the memory plan."""

import dataclasses
import io
import mmap
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import tdjax
from tdjax.errors import CheckpointError, UsageError
from tdjax.generate.__main__ import text_encoder_device
from tdjax.generate.arguments import parse
from tdjax.pipeline import memory
from tdjax.pipeline.compilation import Programs
from tdjax.pipeline.components import Component, PublishedComponent, open_component
from tdjax.pipeline.text_encoding import TextEncoding, open_tokenizer
from tdjax.progress import Stages
from tdjax.text.sentencepiece import parse as parse_spiece
from tdjax.text.tokenizer import Tokenizer

STATM = Path("/proc/self/statm")
PROMPTS = ["a red circle", "three blue squares drift slowly over a green field of grass"]
SMALL = {"num_frames": 5, "width": 32, "height": 32, "num_steps": 1, "output_type": "latent"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A umT5 file by its published names: 5 layers, heads of 64."""
    rng, state = (
        np.random.default_rng(0),
        {"token_embedding.weight": (256, 128), "norm.weight": (128,)},
    )
    for i in range(5):
        block = {
            "norm1.weight": (128,),
            "norm2.weight": (128,),
            "pos_embedding.embedding.weight": (32, 2),
        }
        block |= {f"attn.{p}.weight": (128, 128) for p in "qkvo"}
        block |= {
            "ffn.gate.0.weight": (192, 128),
            "ffn.fc1.weight": (192, 128),
            "ffn.fc2.weight": (128, 192),
        }
        state |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    path = tmp_path_factory.mktemp("published") / "models_t5.safetensors"
    save_file(
        {
            key: rng.normal(size=shape).astype(np.float32) * np.float32(0.09)
            for key, shape in state.items()
        },
        path,
    )
    return path


def encoder(path, tokenizer, dtype="float32", text_len=32) -> TextEncoding:
    component, stages = open_component(path, "text"), Stages(show=False)
    policy = tdjax.Policy(param=dtype, compute=dtype)
    component.config = dataclasses.replace(component.stored, policy=policy, text_len=text_len)
    return TextEncoding(Programs(stages), component, Tokenizer(tokenizer, text_len), None, stages)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"), [("ours", "float32"), ("published", "float32"), ("published", "bfloat16")]
)
def test_streamed_is_whole(model, published, kind, dtype):
    text = encoder(model / "text" if kind == "ours" else published, model / "tokenizer.json", dtype)
    tokens = text.tokenizer.encode(PROMPTS)
    whole = np.stack(list(text.whole(text.component.load(), tokens)))
    streamed = np.stack(text.streamed(tokens))
    assert streamed.dtype == whole.dtype and streamed.shape == (2, 32, text.component.config.dim)
    assert np.array_equal(streamed.astype(np.float32), whole.astype(np.float32))
    assert np.abs(whole[:, 0].astype(np.float32)).max() > 0.1 and not whole[0, -1].any()


def test_few_layers_are_alive(model, published, monkeypatch):
    text, seen = encoder(published, model / "tokenizer.json"), []
    tokens = text.tokenizer.encode(PROMPTS[:1])

    def watched(self, prefix, layers=PublishedComponent.layers):
        for leaves in layers(self, prefix):
            alive = sum(ref() is not None for ref in seen)
            assert alive <= 1, f"{alive} earlier layers when layer {len(seen)} arrives"
            seen.append(weakref.ref(leaves["blocks.attn.q.kernel"]))
            yield leaves

    monkeypatch.setattr(PublishedComponent, "layers", watched)
    monkeypatch.setattr(Component, "load", lambda self: pytest.fail("the whole encoder was loaded"))
    text.streamed(tokens)
    assert len(seen) == 5


def test_only_the_rows_of_the_prompt_are_read(published):
    component = open_component(published, "text")
    reads = []
    tensor = component.file.tensors["token_embedding.weight"]
    component.file.tensors = dict(component.file.tensors)
    whole = tensor.read()

    class Counted(type(tensor)):
        def rows(self, start, stop):
            reads.append(stop - start)
            return super().rows(start, stop)

        def read(self):
            assert self.shape[0] == 1, "the whole table was read"
            return super().read()

    component.file.tensors["token_embedding.weight"] = Counted(**vars(tensor))
    got = component.rows("embed.embedding", np.array([3, 9, 255]))
    assert reads == [1, 1, 1] and np.array_equal(
        got.astype(np.float32), whole[[3, 9, 255]].astype(got.dtype).astype(np.float32)
    )


def test_rows_after_a_prompts_end_take_no_memory(model, monkeypatch):
    """A thousand prompts in one call, each of which fills a few rows of its place."""
    if not STATM.exists():
        pytest.skip("nothing says here what memory a process holds")
    text = encoder(model / "text", model / "tokenizer.json", text_len=512)
    row = np.zeros((512, text.component.config.dim), np.float32)
    row[:3] = 1
    monkeypatch.setattr(text, "encode", lambda tokens, plan: (row for _ in tokens.ids))
    resident = lambda: int(STATM.read_text().split()[1]) * mmap.PAGESIZE
    before = resident()
    embeds = text.embed(["a red circle"] * 1000, None)
    assert resident() - before < embeds.nbytes / 4
    assert np.array_equal(embeds[[0, -1]], [row, row])


@pytest.mark.slow
def test_the_pipeline_gives_the_same_video(model):
    call = lambda **kw: tdjax.load(model, prompt_cache=False, **kw)("a red circle", **SMALL)
    whole, streamed, lean = call(), call(text_encoder_device="stream"), call(low_memory=True)
    assert np.array_equal(whole.latents, streamed.latents) and np.array_equal(
        whole.latents, lean.latents
    )
    assert "load text" in whole.timings
    for result in (streamed, lean):
        assert "text, layer by layer" in result.timings and "load text" not in result.timings


def test_the_memory_plan_chooses(model, monkeypatch):
    pipe, stays = tdjax.load(model), tdjax.load(model, text_encoder_device="device")
    request = pipe.request("a", **SMALL)
    whole = pipe.plan(request)
    need = sum(stage.weights for stage in whole) + max(stage.working for stage in whole)
    encoder = pipe.components["text"].abstract()
    assert not whole.stream_text and whole.of("text").weights == memory.module_bytes(encoder)
    monkeypatch.setattr(memory, "memory_limit", lambda: 2 * need)
    assert not pipe.plan(request).stream_text
    monkeypatch.setattr(memory, "memory_limit", lambda: need // 2)
    assert pipe.plan(request).stream_text and not stays.plan(request).stream_text


def test_who_streams(monkeypatch):
    choose = lambda *argv: text_encoder_device(parse(list(argv)))
    assert choose() == "auto"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (
        choose() == "stream" and choose("--serve") == "auto" and choose("--mesh", "sp=2") == "auto"
    )
    assert choose("--text_encoder_device", "device") == "device"


def test_streaming_needs_one_device(model):
    with pytest.raises(UsageError, match="one device"):
        tdjax.load(model, mesh="tp=2", text_encoder_device="stream")
    with pytest.raises(UsageError, match="text_encoder_device is 'disk'"):
        tdjax.load(model, text_encoder_device="disk")


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_a_gguf_file_holds_its_own_tokenizer(tmp_path, byte_fallback):
    """The ids of the SentencePiece model that it was made from."""
    spm, gguf = pytest.importorskip("sentencepiece"), pytest.importorskip("gguf")
    texts = ["a small red fox moves left over  snow", "Ein roter Fuchs läuft, №½ 草"] * 20
    data = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=data,
        vocab_size=330 if byte_fallback else 60,
        byte_fallback=byte_fallback,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=3,
    )
    model = parse_spiece(data.getvalue())
    writer = gguf.GGUFWriter(tmp_path / "umt5.gguf", "t5encoder")
    writer.add_tokenizer_model("t5")
    writer.add_token_list([text for text, _, _ in model.pieces])
    writer.add_token_scores([score for _, score, _ in model.pieces])
    writer.add_token_types([kind for _, _, kind in model.pieces])
    writer.add_precompiled_charsmap(model.charsmap)
    writer.add_remove_extra_whitespaces(model.remove_extra_spaces)
    writer.add_add_space_prefix(model.dummy_prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = open_tokenizer(tmp_path / "umt5.gguf", 32)
    oracle = spm.SentencePieceProcessor(model_proto=data.getvalue())
    for text in (*texts[:2], "snow fox ½", "what  is ☃ this"):
        assert ours.library.encode(text, add_special_tokens=False).ids == oracle.encode(text)


def test_a_gguf_file_without_a_tokenizer(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "umt5.gguf", "t5encoder")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="no tokenizer of umT5"):
        open_tokenizer(tmp_path / "umt5.gguf", 32)


def test_a_safetensors_file_may_hold_its_own_tokenizer(tmp_path, write_safetensors):
    pieces = [(b"</s>", 3), (b"<unk>", 2), ("\u2581a".encode(), 1)]
    rows = [b"\n" + bytes([len(text)]) + text + b"\x18" + bytes([kind]) for text, kind in pieces]
    model = b"".join(b"\n" + bytes([len(row)]) + row for row in rows)
    held = {"spiece_model": np.frombuffer(model, np.uint8), "shared.weight": np.ones((3, 2), "f4")}
    path = write_safetensors(tmp_path / "umt5.safetensors", held)
    assert open_tokenizer(path, 4).encode(["a a"]).ids.tolist() == [[2, 2, 0, 0]]
    del held["spiece_model"]
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        open_tokenizer(write_safetensors(path, held), 4)
