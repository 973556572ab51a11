"""Synthetic knee radiographs: drawings, not patients. They show that code runs and learns, nothing clinical.

Each frontal knee has a femur with two condyles, a tibia with its spines, a fibula and soft tissue. With the
grade the joint space narrows (medially more than laterally), spurs grow at its margins from the middle of the
scale on, and the bone beside it turns denser. Patients have two knees of the same or neighbouring grades.
Four scanners (sites) differ in exposure, contrast, noise and blur.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter

from scalefl.contracts import SPLITS, DataSplits, Example, InputError
from scalefl.data.partition import split_patients
from scalefl.seeding import numpy_rng

if TYPE_CHECKING:
    from scalefl.config.options import RunConfig

Plane = np.ndarray
"""One value for each pixel, (128, 128)."""

SIZE_PX = 128
MIN_PATIENTS = 3
"""One for each split."""
SEVERITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the tables below are given; severity = grade / highest grade, other scales interpolate."""
MEDIAL_GAP = (0.200, 0.165, 0.125, 0.080, 0.030)
LATERAL_GAP = (0.205, 0.190, 0.170, 0.145, 0.115)
"""Width of the joint space in half images."""
SPUR_SIZE = (0.0, 0.02, 0.065, 0.095, 0.130)
"""Length of osteophytes in half images."""
SCLEROSIS = (0.0, 0.03, 0.09, 0.17, 0.27)
"""Extra brightness of the bone beside the joint; air is 0 and dense bone about 1."""
SOFT = 0.03
"""Width of an edge in half images: two pixels."""


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """How one site's images differ from another's."""

    gamma: float
    contrast: float
    noise: float
    blur_px: float


SCANNERS = {
    "site-a": Scanner(gamma=1.0, contrast=1.0, noise=0.02, blur_px=0.0),
    "site-b": Scanner(gamma=0.75, contrast=0.85, noise=0.035, blur_px=0.5),
    "site-c": Scanner(gamma=1.3, contrast=1.05, noise=0.03, blur_px=0.3),
    "site-d": Scanner(gamma=1.0, contrast=0.7, noise=0.05, blur_px=0.8),
}


def load(run: RunConfig) -> DataSplits:
    """Two knees each of `run.num_patients` patients, split by patient; images are drawn when read.

    Patients cycle through grades and sites, so that both are balanced.
    """
    num_grades = len(run.answers)
    if run.num_patients < MIN_PATIENTS:
        raise InputError(
            f"--num_patients: got {run.num_patients}; expected {MIN_PATIENTS} or more, one for each of "
            f"{', '.join(SPLITS)}; try 100."
        )
    if num_grades < 2:
        raise InputError(f"--answers: got {num_grades}; expected 2 or more grades to draw.")
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    names = [f"s{number:04d}" for number in range(run.num_patients)]
    split_of = split_patients(names, run.seed)
    for number, patient in enumerate(names):
        grades = _grades(run.seed, patient, number % num_grades, num_grades)
        site = list(SCANNERS)[number // num_grades % len(SCANNERS)]
        for side, grade in grades.items():
            example = Example(
                image_key=f"{patient}{side}",
                patient=patient,
                site=site,
                question=run.question,
                answer=run.answers[grade],
                label=grade,
            )
            splits[split_of[patient]].append(example)
    return DataSplits(
        name="synthetic",
        splits={split: tuple(examples) for split, examples in splits.items()},
        answers=run.answers,
        read_image=functools.partial(_read, run.seed, num_grades),
    )


def draw(rng: np.random.Generator, severity: float, side: str, scanner: Scanner) -> Image.Image:
    """One knee, 128 x 128 grey. `severity` is 0..1. On `side` R the medial compartment is on the right."""
    u, v = _knee_coordinates(rng, side)
    tissue = _soft_tissue(u, rng)
    bones = _bones(u, v, severity, rng)
    air_to_bone = tissue + (1 - 0.4 * tissue) * bones
    return _expose(air_to_bone, scanner, rng)


def _read(seed: int, num_grades: int, example: Example) -> Image.Image:
    assert example.label is not None and example.site is not None  # as `load` made it
    rng = numpy_rng(seed, f"synthetic/image/{example.image_key}")
    severity = example.label / (num_grades - 1)
    return draw(rng, severity, example.image_key[-1], SCANNERS[example.site])


def _grades(seed: int, patient: str, grade: int, num_grades: int) -> dict[str, int]:
    """The grades of the left and the right knee; one is `grade`, the other differs by one at most."""
    rng = numpy_rng(seed, f"synthetic/patient/{patient}")
    other = int(np.clip(grade + rng.choice([-1, 0, 1], p=[0.2, 0.6, 0.2]), 0, num_grades - 1))
    pair = (grade, other) if rng.random() < 0.5 else (other, grade)
    return dict(zip("LR", pair, strict=True))


def _knee_coordinates(rng: np.random.Generator, side: str) -> tuple[Plane, Plane]:
    """u from medial to lateral and v downwards, -1..1 about the joint, after rotation, scale and shift."""
    axis = np.linspace(-1, 1, SIZE_PX, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    if side == "R":
        x = -x
    angle = np.float32(rng.normal(0, np.deg2rad(3)))
    scale = np.float32(rng.normal(1, 0.04))
    shift_x, shift_y = rng.normal(0, 0.025, 2).astype(np.float32)
    x, y = (x - shift_x) / scale, (y - shift_y) / scale
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _soft_tissue(u: Plane, rng: np.random.Generator) -> Plane:
    """A column that thins out to both sides."""
    half_width, density = rng.normal(0.97, 0.05), rng.normal(0.3, 0.02)
    thickness = np.sqrt(np.clip(1 - (u / half_width) ** 2, 0, 1))
    return density * thickness


def _bones(u: Plane, v: Plane, severity: float, rng: np.random.Generator) -> Plane:
    """Density of femur, tibia and fibula with everything that the grade changes."""
    half_width = rng.normal(0.68, 0.02)
    gap = _joint_gap(u, severity, rng)
    femur_end = _femur_end(u, half_width) - gap / 2
    tibia_end = _tibia_end(u, half_width) + gap / 2
    shaft = 0.33 + (half_width - 0.33) * np.stack([_rise(v, -0.85, -0.3), _rise(-v, -0.8, -0.25)])
    femur = _inside(shaft[0] - np.abs(u)) * _inside(femur_end - v)
    tibia = _inside(shaft[1] - np.abs(u)) * _inside(v - tibia_end)
    fibula = _inside(0.09 - np.abs(u - 0.58 - 0.05 * v)) * _inside(v - 0.33)
    spurs = _spurs(u, v, half_width, gap, severity, rng)
    cortex = 4 * (femur * (1 - femur) + tibia * (1 - tibia))
    dense = (
        _sclerosis(u, v - tibia_end, severity, rng) * tibia
        + _sclerosis(u, femur_end - v, severity, rng) * femur
    )
    texture = _texture(rng)
    bone = np.maximum(np.maximum(femur, tibia), spurs) * (0.5 + texture) + 0.12 * cortex + dense
    return np.maximum(bone, 0.3 * fibula)


def _joint_gap(u: Plane, severity: float, rng: np.random.Generator) -> Plane:
    """Joint space at each u. Knees of one grade differ by about a third of the step to the next."""
    medial = np.interp(severity, SEVERITIES, MEDIAL_GAP) + rng.normal(0, 0.012)
    lateral = np.interp(severity, SEVERITIES, LATERAL_GAP) + rng.normal(0, 0.012)
    return max(medial, 0.01) + (lateral - medial) * _rise(u, -0.3, 0.3)


def _femur_end(u: Plane, half_width: float) -> Plane:
    """Two condyles: a notch between them, rounded off at the margins."""
    return -0.13 * np.exp(-((u / 0.13) ** 2)) - 0.16 * np.abs(u / half_width) ** 5


def _tibia_end(u: Plane, half_width: float) -> Plane:
    """A plateau with two spines."""
    spines = np.exp(-(((u - 0.06) / 0.05) ** 2)) + np.exp(-(((u + 0.06) / 0.05) ** 2))
    return 0.05 * np.abs(u / half_width) ** 8 - 0.07 * spines


def _spurs(
    u: Plane, v: Plane, half_width: float, gap: Plane, severity: float, rng: np.random.Generator
) -> Plane:
    """Osteophytes: lips that grow outwards from the four corners of the joint."""
    spurs = np.zeros_like(u)
    for margin in (-1, 1):
        for corner in (-0.14 - gap / 2, 0.05 + gap / 2):  # femur, tibia
            size = np.interp(severity, SEVERITIES, SPUR_SIZE) * rng.uniform(0.6, 1.3)
            if size < 0.03:
                continue
            along = (u - margin * (half_width - 0.04)) / size
            across = (v - corner) / (0.6 * size)
            spurs = np.maximum(spurs, _inside(0.5 * size * (1 - along**2 - across**2)))
    return spurs


def _sclerosis(u: Plane, depth: Plane, severity: float, rng: np.random.Generator) -> Plane:
    """A bright band below the joint surface, stronger on the medial side."""
    amount = np.interp(severity, SEVERITIES, SCLEROSIS) * rng.uniform(0.7, 1.3)
    return amount * (1 - 0.6 * _rise(u, -0.3, 0.3)) * np.exp(-((depth / 0.09) ** 2))


def _texture(rng: np.random.Generator) -> Plane:
    """Trabeculae: noise at a few pixels' scale."""
    coarse = Image.fromarray(rng.normal(0, 0.04, (SIZE_PX // 4, SIZE_PX // 4)).astype(np.float32))
    return np.asarray(coarse.resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR))


def _expose(density: Plane, scanner: Scanner, rng: np.random.Generator) -> Image.Image:
    exposure = rng.normal(1, 0.05)
    noise = rng.normal(0, scanner.noise, density.shape)
    brightness = scanner.contrast * np.clip(exposure * density, 0, None) ** scanner.gamma + noise
    image = Image.fromarray((np.clip(brightness, 0, 1) * 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(scanner.blur_px)) if scanner.blur_px else image


def _inside(distance: Plane) -> Plane:
    """1 where the distance to an outline is positive, 0 outside, with a soft edge."""
    return np.clip(distance / SOFT + 0.5, 0, 1)


def _rise(x: Plane, start: float, stop: float) -> Plane:
    """A smooth step from 0 at `start` to 1 at `stop`."""
    t = np.clip((x - start) / (stop - start), 0, 1)
    return t * t * (3 - 2 * t)
