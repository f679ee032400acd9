"""What is inside a traced function: its equations, and how large its values become."""


def inner(value):
    """The jaxprs in an equation's parameters: one, closed or not, or several."""
    if isinstance(value, list | tuple):
        return [j for v in value for j in inner(v)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


def largest(jaxpr) -> int:
    """Bytes of the largest value in a jaxpr, inner ones included."""
    sizes = [v.aval.size * v.aval.dtype.itemsize for e in jaxpr.eqns for v in e.outvars]
    return max(
        [*sizes, *(largest(j) for e in jaxpr.eqns for p in e.params.values() for j in inner(p))],
        default=0,
    )


def equations(jaxpr):
    """Every equation of a jaxpr, inner ones included; those of a loop's body once."""
    for e in jaxpr.eqns:
        yield e
        for p in e.params.values():
            for j in inner(p):
                yield from equations(j)
