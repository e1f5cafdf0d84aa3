"""What the source of a latent diffusion shows: ranges, clamps, conditions. By shape of the code, not by its names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rqvae.health.finding import Evidence, Found, check
from rqvae.health.source import (
    Function,
    Source,
    SourceFile,
    applications,
    called,
    constant,
    from_symmetric,
    has_call,
    names_in,
    to_symmetric,
)
from rqvae.health.subject import Subject

_POWER = "every Python file of the source was parsed"
_ENCODE, _DECODE = r"encode|encode_first_stage", r"decode|decode_first_stage"
_NORMALISERS = r"Normalize|normalize"


def _source(subject: Subject) -> Source:
    assert subject.source is not None
    return subject.source


def _where(file: SourceFile, node: ast.AST) -> Evidence:
    return Evidence(file.text(node), getattr(node, "lineno", 1), file.name)


def _image_encodes(source: Source) -> Iterator[tuple[SourceFile, Function, ast.Call]]:
    """Calls of an autoencoder's encode: those whose result has a distribution, or that stand beside a "
    "decode somewhere."""
    if not source.encodes_latents:
        return
    for file, function in source.functions():
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and re.fullmatch(_ENCODE, called(node)) and node.args:
                text = isinstance(node.args[0], ast.Constant | ast.JoinedStr)
                if not text and function.name not in ("encode", "decode"):
                    yield file, function, node


def _normalises(source: Source) -> bool:
    """Whether images are brought to [-1, 1] by a transform, or within an encode that the source itself defines."""
    if any(any(constant(n) == 0.5 for n in ast.walk(call)) for _, call in source.calls(_NORMALISERS)):
        return True
    symmetric = {function.name for _, function in source.functions() if applications(source, function, to_symmetric)}
    encoders = [function for _, function in source.functions() if re.fullmatch(_ENCODE, function.name)]
    steps = [
        {called(n) for n in ast.walk(function) if isinstance(n, ast.Call)} | {function.name} for function in encoders
    ]
    return any(symmetric & calls for calls in steps)


def encodes_raw(source: Source) -> list[tuple[SourceFile, ast.Call]]:
    """Calls of encode whose function does not bring anything to [-1, 1] first, in a source that has no "
    "transform for it."""
    found: list[tuple[SourceFile, ast.Call]] = []
    if _normalises(source):
        return found
    for file, function, call in _image_encodes(source):
        if not applications(source, function, to_symmetric):
            found.append((file, call))
    return found


def _symmetric_latents(source: Source) -> list[tuple[SourceFile, ast.AST]]:
    """Where 2x - 1 is applied although images are encoded raw elsewhere: it is latents that it is applied to."""
    if not encodes_raw(source):
        return []
    found = []
    for file, function in source.functions():
        if not has_call(function, _ENCODE) and not _loads_data(file, function):
            found += [(file, node) for node, _ in applications(source, function, to_symmetric)]
    return found


def _loads_data(file: SourceFile, function: Function) -> bool:
    """Whether a function belongs to a data set or a transform."""
    for owner in file.classes:
        if function in owner.body:
            return any(isinstance(m, Function) and m.name == "__getitem__" for m in owner.body)
    return function.name in ("__getitem__", "__call__")


@check(
    "NORM.LATENTS_SHIFTED",
    "2x - 1 is applied to latents",
    "major",
    needs=("source",),
    threshold="the source encodes images as they are, and applies 2x - 1 (written out or by a helper) in "
    "another function that "
    "neither encodes nor loads data",
    alternatives=("a second, pixel-space model in the same source",),
    recommendation=("drop it for latents; normalise images before encoding instead",),
    verify="latents have mean 0 and standard deviation 1 where the loss is computed",
)
def latents_shifted(subject: Subject) -> Iterator[Found]:
    """An image normalisation on latents."""
    for file, node in _symmetric_latents(_source(subject)):
        encode_file, encode = encodes_raw(_source(subject))[0]
        yield Found(
            "2x - 1, meant for images in [0, 1], is applied to latents",
            (_where(file, node), _where(encode_file, encode)),
            confidence=0.85,
            power=_POWER,
        )
        return


@check(
    "NORM.ASYMMETRIC",
    "a normalisation that is never undone",
    "major",
    needs=("source",),
    threshold="latents are mapped by 2x - 1 before the loss, and no (x + 1) / 2 stands before the decoder",
    recommendation=("make the inverse a function beside the forward one, and test their product",),
    verify="decode(inverse(forward(encode(image)))) is the image",
)
def asymmetric(subject: Subject) -> Iterator[Found]:
    """Forward without inverse."""
    source = _source(subject)
    forward = _symmetric_latents(source)
    if not forward:
        return
    for file, function in source.functions():
        decodes = [n for n in ast.walk(function) if isinstance(n, ast.Call) and re.fullmatch(_DECODE, called(n))]
        for decode in decodes:
            undone = any(
                getattr(node, "lineno", 0) <= decode.lineno and _feeds(node, decode)
                for node, _ in applications(source, function, from_symmetric)
            )
            if not undone and function.name not in ("decode", "encode"):
                yield Found(
                    "latents are mapped by 2x - 1 and decoded without the inverse",
                    (_where(*forward[0]), _where(file, decode)),
                    confidence=0.85,
                    power=_POWER,
                )
                return


def _feeds(node: ast.AST, decode: ast.Call) -> bool:
    """Whether a mapping can be what is decoded: it shares a name with the decoder's argument, or is within it."""
    inside = any(node is n for argument in decode.args for n in ast.walk(argument))
    wanted = set().union(*(names_in(argument) for argument in decode.args)) if decode.args else set()
    contains = any(n is decode for n in ast.walk(node))
    return not contains and (inside or bool(wanted & names_in(node)))


@check(
    "NORM.DENORMALISED_TWICE",
    "images in [0, 1] are denormalised again",
    "minor",
    needs=("source",),
    threshold="(x + 1) / 2 is applied to a batch as the loader gives it, or to a decoder's output, in a "
    "source that never "
    "brings images to [-1, 1]",
    recommendation=("save images as they are; map the decoder's output only if its input was mapped",),
    verify="saved test images span [0, 255] like the files",
)
def denormalised_twice(subject: Subject) -> Iterator[Found]:
    """The inverse of a map that was never applied."""
    source = _source(subject)
    if _normalises(source) or not encodes_raw(source):
        return
    for file, function in source.functions():
        loaded: set[str] = set()
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and called(node.value) == "next":
                loaded |= set().union(*(names_in(target) for target in node.targets))
        for node, argument in applications(source, function, from_symmetric):
            if names_in(argument) & loaded:
                yield Found(
                    "a batch in [0, 1] is mapped by (x + 1) / 2: saved pictures are washed out",
                    (_where(file, node),),
                    confidence=0.85,
                    power=_POWER,
                )
                return


def _clamps(function: Function) -> list[tuple[ast.Call, bool]]:
    """(call, whether within the decoder's output) of clamps to [-1, 1]."""
    found = []
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        arguments = [*node.args, *(k.value for k in node.keywords)]
        named = re.fullmatch(r"clamp_?|clip", called(node)) or (
            called(node) == "partial" and any("clamp" in ast.dump(a) or "'clip'" in ast.dump(a) for a in node.args[:1])
        )
        borders = [constant(a) for a in arguments]
        if named and -1.0 in borders and 1.0 in borders:
            found.append((node, has_call(node, _DECODE)))
    return found


@check(
    "DIFF.CLAMP_IN_LATENT",
    "predictions are clamped to [-1, 1] in latent space",
    "major",
    needs=("source",),
    threshold="a clamp to [-1, 1], not of a decoder's output, in a source that trains on latents; a clamp "
    "behind a switch counts "
    "if a call turns it on",
    alternatives=("a pixel-space model in the same source",),
    recommendation=(
        "do not clamp in latent space; for x0 use no or a dynamic threshold at the latents' own range",
        "do not clip a noise prediction at all: 31.7 % of unit-variance targets lie outside [-1, 1]",
    ),
    verify="less than 1 % of the predicted latents lie at the clamp's borders",
    source="2 * (1 - Phi(1)) = 0.317 of a unit normal lies outside [-1, 1]",
)
def clamp_in_latent(subject: Subject) -> Iterator[Found]:
    """Clamps beside an autoencoder."""
    source = _source(subject)
    if not source.encodes_latents:
        return
    for file, function in source.functions():
        for call, decoded in _clamps(function):
            if not decoded and not has_call(function, _DECODE) and _turned_on(source, function, call):
                yield Found(
                    "x0 is clamped to [-1, 1] although it is a latent: of unit-variance latents 31.7 % are cut",
                    (_where(file, call),),
                    confidence=0.85,
                    power=_POWER,
                )
                return


def _turned_on(source: Source, function: Function, call: ast.Call) -> bool:
    """Whether the clamp runs: behind no switch, one whose default is on, or one that a call turns on."""
    arguments = function.args
    defaults = dict(zip([a.arg for a in arguments.args[::-1]], arguments.defaults[::-1], strict=False))
    defaults |= {a.arg: d for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=False) if d is not None}
    for node in ast.walk(function):
        guarded = isinstance(node, ast.If | ast.IfExp) and any(n is call for n in ast.walk(node))
        switches = names_in(node.test) & set(defaults) if guarded else set()  # type: ignore[attr-defined]
        for switch in switches:
            default = defaults[switch]
            if isinstance(default, ast.Constant) and default.value is False:
                return any(
                    k.arg == switch and isinstance(k.value, ast.Constant) and k.value.value is True
                    for _, c in source.calls(r".+")
                    for k in c.keywords
                )
    return True


@check(
    "COND.CLASS_BLIND",
    "the spatial condition does not know classes",
    "major",
    needs=("source",),
    threshold="a forward pass compares a pooled mask (or the mask it is given) with > 0 and uses the result "
    "with attention",
    alternatives=("masks that have one class and a background",),
    recommendation=("give the network one-hot masks at its resolution, by area average",),
    verify="two masks with swapped classes give different predictions",
)
def class_blind(subject: Subject) -> Iterator[Found]:
    """A mask reduced to inside or outside."""
    for file, function in _source(subject).functions():
        parameters = {a.arg for a in function.args.args} - {"self"}
        attends = has_call(function, r"softmax|einsum|scaled_dot_product_attention|attention|attend|bmm")
        for node in ast.walk(function):
            binary = (
                isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Gt) and constant(node.comparators[0]) == 0
            )
            if attends and binary and _of_mask(node.left, function, parameters):  # type: ignore[attr-defined]
                yield Found(
                    "the mask enters attention as mask > 0: all classes look alike",
                    (_where(file, node),),
                    confidence=0.8,
                    power=_POWER,
                )
                return


def _of_mask(node: ast.AST, function: Function, parameters: set[str]) -> bool:
    """Whether what is compared is a pooled parameter or one that is pooled before."""
    pool = r".*max_?pool\w*|pool|interpolate|.*down.*"
    if has_call(node, pool):
        return bool(names_in(node) & parameters)
    pooled = {
        target.id
        for n in ast.walk(function)
        if isinstance(n, ast.Assign) and has_call(n.value, pool) and names_in(n.value) & parameters
        for target in n.targets
        if isinstance(target, ast.Name)
    }
    return bool(names_in(node) & pooled)


def _blend(node: ast.AST) -> bool:
    """a + (b - a) * s, in any order: guidance."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)):
        return False
    for base, rest in ((node.left, node.right), (node.right, node.left)):
        if isinstance(rest, ast.BinOp) and isinstance(rest.op, ast.Mult):
            for difference in (rest.left, rest.right):
                is_difference = isinstance(difference, ast.BinOp) and isinstance(difference.op, ast.Sub)
                if is_difference and ast.dump(difference.right) == ast.dump(base):  # type: ignore[attr-defined]
                    return True
    return False


@check(
    "COND.NULL_IS_A_CLASS",
    "the null condition is a class",
    "major",
    needs=("source",),
    threshold="guidance a + (b - a) * s whose null is zeros, in a source whose class embedding has no row "
    "beyond the classes",
    alternatives=("class 0 is reserved for the null condition",),
    recommendation=("give the embedding one more row, or learn a null vector, and drop conditions to it in training",),
    verify="the unconditional samples are not those of class 0",
    source="Ho and Salimans, Classifier-Free Diffusion Guidance, 2022: a null token",
)
def null_is_a_class(subject: Subject) -> Iterator[Found]:
    """Zeros as the null of integer classes."""
    source = _source(subject)
    tables = [(f, c) for f, c in source.calls("Embedding") if c.args]
    if not tables or any(isinstance(c.args[0], ast.BinOp) for _, c in tables):
        return
    for file, function in source.functions():
        zeros = [n for n in ast.walk(function) if isinstance(n, ast.Call) and called(n) in ("zeros_like", "zeros")]
        if zeros and any(_blend(node) for node in ast.walk(function)):
            yield Found(
                "guidance uses zeros as null condition, and 0 is a class with its own embedding",
                (_where(file, zeros[0]), _where(*tables[0])),
                confidence=0.85,
                power=_POWER,
            )
            return


@check(
    "COND.SAMPLER_ONE_CLASS",
    "without a list of classes the sampler draws class 0 only",
    "major",
    needs=("source",),
    threshold="a function that builds cumulative probabilities returns [1.0] where its list is empty, and "
    "the config names no list; "
    "info where the log shows draws of several classes",
    recommendation=("default to all classes, or refuse an empty list",),
    verify="1000 draws show all classes",
)
def one_class(subject: Subject) -> Iterator[Found]:
    """A default that makes the conditional run unconditional."""
    for file, function in _source(subject).functions():
        if not has_call(function, "cumsum"):
            continue
        for node in ast.walk(function):
            if not (isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and node.value.args):
                continue
            listed = node.value.args[0]
            if isinstance(listed, ast.List) and [constant(e) for e in listed.elts] == [1.0]:
                draws = subject.segment.series.get("draw/class")
                refuted = draws is not None and len(set(draws.values.tolist())) > 1
                words = "; the draws in this log show that it ran with another version" if refuted else ""
                yield Found(
                    f"an empty list of classes gives the probabilities [1.0]: class 0 always{words}",
                    (_where(file, node),),
                    severity="info" if refuted else None,
                    confidence=0.6 if refuted else 0.8,
                    power=_POWER,
                )
                return
