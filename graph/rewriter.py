"""The one thing that mutates a graph.

A pass gets a :class:`Rewriter` over a clone and changes it through these calls
only. In return every new node carries provenance (the place of the node it
stands for, the pass that made it) and a fake value, every replacement is
checked for equal shape and dtype on the spot, and ``modified`` is a count
nobody has to keep::

    with rw.at(node):
        weight = rw.add_parameter(f"{name}.lora_a", tensor)
        product = rw.call(aten.linear.default, x, weight)
    rw.replace(node, product)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import shapes
from .errors import PreconditionError
from .program import Program, attach, detach
from .provenance import KEY, Provenance, describe, provenance
from .signature import InputSpec, Signature


class Rewriter:
    """Mutates the module of one program on behalf of one pass.

    Args:
        program: a clone that nobody else holds; its fake values are computed
            here if it has none (a program just read from disk).
        made_by: text form of the pass, stamped on every node it makes.

    Attributes:
        modified: replacements, argument changes and erasures so far.
        notes: sentences for the report, in order.
    """

    def __init__(self, program: Program, made_by: str) -> None:
        self.program = program
        self.module = program.module
        self.graph = program.module.graph
        self.made_by = made_by
        self.modified = 0
        self.notes: list[str] = []
        self._here = Provenance()
        self._readers = {str(n.target): n for n in self.graph.nodes if n.op == "get_attr"}
        self._names = {name for name, _ in program.tensors()}
        mode = shapes.fake_mode(self.graph)
        if mode is None:
            shapes.propagate(self.module, program.signature)
            mode = shapes.fake_mode(self.graph)
        assert mode is not None
        self._mode = mode

    def note(self, sentence: str) -> None:
        """Adds a sentence to the report."""
        self.notes.append(sentence)

    @contextmanager
    def at(self, node: fx.Node, *, like: fx.Node | None = None) -> Iterator[None]:
        """New nodes go before ``node`` and take its place in the source, or that of ``like``."""
        before = self._here
        self._here = provenance(like or node)
        try:
            with self.graph.inserting_before(node):
                yield
        finally:
            self._here = before

    @contextmanager
    def after(self, node: fx.Node) -> Iterator[None]:
        """New nodes go after ``node``, in the order of the calls, with its place in the source."""
        with self.at(node.next):
            self._here = provenance(node)
            yield

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Inserts ``target(*args, **kwargs)`` at the current point; args may hold nodes.

        Raises:
            PreconditionError: when the operator refuses these shapes or dtypes.
        """
        node = self.graph.call_function(target, args, kwargs)
        node.meta[KEY] = self._here.by(self.made_by)
        try:
            shapes.infer(node, self.module, self._mode)
        except Exception as error:
            where = describe(node)
            self.graph.erase_node(node)
            raise PreconditionError(f"{target} does not fit here: {error}", where=where) from error
        return node

    def get_attr(self, name: str) -> fx.Node:
        """The node that reads the tensor ``name``: the one there is, or a new one at the head."""
        known: fx.Node | None = self._readers.get(name)
        if known is not None and not known._erased:
            return known
        with self.graph.inserting_after(self._last_placeholder()):
            node = self.graph.get_attr(name)
        self._readers[name] = node
        node.meta[KEY] = self._here.by(self.made_by)
        shapes.infer(node, self.module, self._mode)
        return node

    def add_parameter(self, name: str, tensor: Tensor, *, trainable: bool = True) -> fx.Node:
        """Registers a new parameter and returns the node that reads it."""
        return self._add(name, nn.Parameter(tensor, requires_grad=trainable))

    def add_buffer(self, name: str, tensor: Tensor) -> fx.Node:
        """Registers a new buffer and returns the node that reads it."""
        return self._add(name, tensor.detach())

    def add_input(self, spec: InputSpec) -> fx.Node:
        """Adds an input after the last one; a dimension that no other has is a new symbol."""
        signature = self.program.signature
        there = (n for n in self.graph.nodes if n.op == "placeholder")
        known = {
            dim: size
            for node, other in zip(there, signature.inputs, strict=True)
            for dim, size in zip(other.shape, shapes.shape(node), strict=True)
            if isinstance(dim, str)
        }
        with self.graph.inserting_after(self._last_placeholder()):
            node = self.graph.placeholder(spec.name)
        node.meta[KEY] = Provenance().by(self.made_by)
        shapes.placeholder(node, spec, known, self._mode)
        self.set_signature(dataclasses.replace(signature, inputs=(*signature.inputs, spec)))
        return node

    def set_tensor(self, name: str, tensor: Tensor) -> None:
        """Gives the existing parameter or buffer ``name`` other contents, shape included.

        The fake values of the nodes that read it follow; those of their users
        do not: change these users in the same rewrite.
        """
        old = self.program.tensor(name)
        detach(self.module, name)
        if isinstance(old, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        attach(self.module, name, tensor)
        shapes.infer(self.get_attr(name), self.module, self._mode)
        self.modified += 1

    def set_trainable(self, name: str, trainable: bool) -> None:
        """Says whether the parameter ``name`` learns."""
        parameter = self.program.tensor(name)
        if parameter.requires_grad != trainable:
            parameter.requires_grad_(trainable)
            self.modified += 1

    def annotate(self, node: fx.Node, key: str, value: Any) -> None:
        """Writes ``value`` on ``node.meta["custom"]``; None takes the key away."""
        custom = dict(node.meta.get("custom", {}))
        before = custom.pop(key, None)
        if value is not None:
            custom[key] = value
        if before == value:
            return
        node.meta.pop("custom", None)
        if custom:
            node.meta["custom"] = custom
        self.modified += 1

    def remove_tensor(self, name: str) -> None:
        """Takes a parameter or buffer off the module, so that ``name.*`` can take its place.

        Replace every node that reads it within the same rewrite.
        """
        detach(self.module, name)
        self._names.discard(name)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Redirects every use of ``old`` to ``new`` and erases ``old``.

        Raises:
            PreconditionError: when they differ in dtype or shape.
        """
        if not shapes.same_type(old.meta[shapes.VAL], new.meta[shapes.VAL]):
            raise PreconditionError(
                f"{self.made_by} replaces {_type(old)} by {_type(new)}", where=describe(old)
            )
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self._inherit(old, new)
        if not old.users:
            self.graph.erase_node(old)
        self.modified += 1

    def set_args(self, node: fx.Node, *args: Any, **kwargs: Any) -> None:
        """Changes the arguments of ``node`` in place; its value must keep its type.

        Raises:
            PreconditionError: when the new arguments change its shape or dtype.
        """
        before = node.meta.get(shapes.VAL)
        node.args, node.kwargs = args, kwargs
        shapes.infer(node, self.module, self._mode)
        if not shapes.same_type(before, node.meta[shapes.VAL]):
            raise PreconditionError(
                f"{self.made_by} changes the type of a value", where=describe(node)
            )
        self.modified += 1

    def redirect(self, old: fx.Node, new: fx.Node, users: Iterable[fx.Node]) -> None:
        """Makes ``users`` read ``new`` instead of ``old``.

        Unlike :meth:`replace` it takes a value of another shape: :meth:`refresh` then.
        """
        for user in users:
            user.replace_input_with(old, new)
        self.modified += 1

    def set_outputs(self, values: Sequence[fx.Node]) -> None:
        """Makes the program return ``values``; :meth:`set_signature` says what they are."""
        output = self.graph.output_node()
        output.args = (tuple(values),)
        shapes.infer(output, self.module, self._mode)
        self.modified += 1

    def set_signature(self, signature: Signature) -> None:
        """Gives the program another interface, which the graph must have by the end."""
        self.program = dataclasses.replace(self.program, signature=signature)
        self.modified += 1

    def erase(self, node: fx.Node) -> None:
        """Removes a node that nobody uses."""
        self.graph.erase_node(node)
        self.modified += 1

    def refresh(self) -> None:
        """Computes all fake values again, after a pass changed the program's inputs or sizes.

        Raises:
            PreconditionError: at the first node that does not fit its inputs any longer.
        """
        for node in self.graph.nodes:
            node.meta.pop(shapes.VAL, None)
        try:
            shapes.propagate(self.module, self.program.signature)
        except Exception as error:
            node = next(n for n in self.graph.nodes if shapes.VAL not in n.meta)
            what = f"{self.made_by}: {node.target} does not fit here: {error}"
            raise PreconditionError(what, where=describe(node)) from error
        mode = shapes.fake_mode(self.graph)
        assert mode is not None
        self._mode = mode

    def finish(self) -> None:
        """Drops what is dead, checks the graph, and compiles it."""
        self.drop_unread()
        self.graph.lint()
        self.module.recompile()

    def drop_unread(self) -> None:
        """Drops dead nodes, tensors nobody reads, whose names are free then, and their ties."""
        for node in reversed(self.graph.nodes):
            if not node.users and node.op in ("call_function", "get_attr") and not node.is_impure():
                self.graph.erase_node(node)
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        read.update(self.program.signature.start.values())
        for name, _ in list(self.program.tensors()):
            if name not in read:
                self.remove_tensor(name)
        lost = self.program.lost_ties()
        self.program = dataclasses.replace(
            self.program, ties=tuple(tie for tie in self.program.ties if tie not in lost)
        )

    def _add(self, name: str, tensor: Tensor) -> fx.Node:
        assert name not in self._names, f"{name} exists"
        self._names.add(name)
        attach(self.module, name, tensor)
        return self.get_attr(name)

    def _last_placeholder(self) -> fx.Node:
        node: fx.Node = self.graph._root
        while node.next.op == "placeholder":
            node = node.next
        return node

    def _inherit(self, old: fx.Node, new: fx.Node) -> None:
        """A replacement keeps the stage and other annotations of what it replaces."""
        if "custom" in old.meta:
            new.meta.setdefault("custom", old.meta["custom"])


def _type(node: fx.Node) -> str:
    val = node.meta[shapes.VAL]
    if isinstance(val, torch.Tensor):
        return f"{str(val.dtype).removeprefix('torch.')}[{', '.join(map(str, val.shape))}]"
    return type(val).__name__
