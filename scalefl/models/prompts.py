"""Text and images in, token ids and pixels out; and a tokenizer made without a download."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL.Image import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import BatchFeature, BlipImageProcessorPil, PreTrainedTokenizerFast, ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

IMAGE_PLACEHOLDER = "<ImageHere>"
IMAGE_SLOT = f"<Img>{IMAGE_PLACEHOLDER}</Img> "
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", IMAGE_PLACEHOLDER)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the run's own prompts and answers: offline, deterministic, and able to write any
    text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(texts)), trainer=trainer)
    unk, bos, eos, pad, _ = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        padding_side="left",
    )


def stretch(pixels_chw: Tensor) -> Tensor:
    """An image whose 1st to 99th percentile fills 0 to 255: exposures differ between scanners."""
    grey_hw = pixels_chw.float().mean(0)  # the same window whether a grey image comes as one channel or three
    low, high = torch.quantile(grey_hw, torch.tensor([0.01, 0.99])).tolist()
    return ((pixels_chw.float() - low) * (255 / max(high - low, 1.0))).round().clamp(0, 255).to(torch.uint8)


class MiniGPTv2Processor(ProcessorMixin):
    """`processor(images=, text=)` -> `input_ids`, `attention_mask`, `pixel_values`.

    The text is segmented at `<ImageHere>` and each segment tokenised alone, as upstream does: tokens never
    merge across an image. The image token stands `num_image_tokens` times where the image goes.
    """

    attributes = ["image_processor", "tokenizer"]

    def __init__(
        self,
        image_processor: BlipImageProcessorPil | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_image_tokens: int = 256,
        image_token_id: int = 4,
        prompt_template: str = "[INST] {} [/INST]",
        end_sym: str = "</s>",
        window: bool = False,
        max_txt_len: int = 500,
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token_id = image_token_id
        self.prompt_template = prompt_template
        self.end_sym = end_sym
        self.window = window
        self.max_txt_len = max_txt_len
        super().__init__(image_processor, tokenizer, **kwargs)

    def encode_text(self, text: str) -> list[int]:
        """BOS and the ids of a whole prompt."""
        ids = [self.tokenizer.bos_token_id]
        for number, segment in enumerate(text.split(IMAGE_PLACEHOLDER)):
            if number:
                ids += [self.image_token_id] * self.num_image_tokens
            ids += self._segment_ids(segment)
        return ids

    def encode_question(self, question: str) -> list[int]:
        """BOS and the ids of the prompt that asks `question` about one image."""
        return self.encode_text(self.prompt_template.format(IMAGE_SLOT + question))

    def encode_answer(self, answer: str) -> list[int]:
        """Ids of an answer with its end symbol, `max_txt_len` of them at most, as upstream."""
        return self._segment_ids(answer + self.end_sym)[: self.max_txt_len]

    def encode_conversation(
        self, questions: Sequence[str], answers: Sequence[str]
    ) -> tuple[list[int], list[int]]:
        """Ids of a conversation about one image, and labels (-100 but for answers, end symbols included).

        The first question may have `<ImageHere>` in it; each further one begins with BOS, as upstream's.
        """
        ids = self.encode_text(self.prompt_template.format(questions[0]))
        labels = [-100] * len(ids)
        rest: list[tuple[int, int]] = []
        for turn, answer in enumerate(answers):
            if turn:
                asked = f"{self.tokenizer.bos_token}{self.prompt_template.format(questions[turn])}"
                rest += [(token, -100) for token in self._segment_ids(asked)]
            rest += [(token, token) for token in self._segment_ids(answer + self.end_sym)]
        rest = rest[: self.max_txt_len]
        return [*ids, *(token for token, _ in rest)], [*labels, *(label for _, label in rest)]

    def _segment_ids(self, segment: str) -> list[int]:
        return self.tokenizer.encode(segment, add_special_tokens=False) if segment else []

    def decode_answer(self, ids: Sequence[int]) -> str:
        """Text before the end symbol."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).split(self.end_sym)[0].strip()

    def resize(self, image: Image) -> Tensor:
        """An image as uint8 (channels, height, width) at the model's size, not yet normalised; grey stays 1
        channel.
        """
        size = self.image_processor.size
        resized = image.resize((size["width"], size["height"]), resample=self.image_processor.resample)
        pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        pixels_chw = pixels.view(size["height"], size["width"], -1).permute(2, 0, 1).contiguous()
        return stretch(pixels_chw) if self.window else pixels_chw

    def normalise(self, pixels_bchw: Tensor) -> Tensor:
        """uint8 pixels -> what the vision tower sees, fp32, 3 channels."""
        mean = torch.tensor(self.image_processor.image_mean).view(3, 1, 1)
        std = torch.tensor(self.image_processor.image_std).view(3, 1, 1)
        return (pixels_bchw.float() / 255 - mean) / std

    def __call__(
        self,
        images: Image | Sequence[Image] | None = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Left-padded prompts ready for `generate`, and normalised pixels.

        A text is a whole prompt with `<ImageHere>` in it, or, beside an image, the bare question.
        """
        features: dict[str, Tensor] = {}
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            rows = [
                self.encode_text(t) if images is None or IMAGE_PLACEHOLDER in t else self.encode_question(t)
                for t in texts
            ]
            features = pad_rows(rows, self.tokenizer.pad_token_id, left=True)
        if images is not None:
            batch = [images] if isinstance(images, Image) else list(images)
            three = [image.convert("RGB") for image in batch]
            features["pixel_values"] = self.normalise(torch.stack([self.resize(image) for image in three]))
        return BatchFeature(features)


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> dict[str, Tensor]:
    """`input_ids` (B, L) and `attention_mask` (B, L; 1 = real) of rows of different lengths."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for ids_row, mask_row, row in zip(ids, mask, rows, strict=True):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        ids_row[place] = torch.tensor(row)
        mask_row[place] = 1
    return {"input_ids": ids, "attention_mask": mask}
