"""Meshes of the CPU devices, made by calls that every supported JAX has."""

import jax

if hasattr(jax, "set_mesh"):
    use_mesh = jax.set_mesh
    reshard = jax.sharding.reshard
else:  # JAX 0.6
    from jax.experimental.shard import reshard as reshard

    use_mesh = jax.sharding.use_mesh


def make_mesh(axes, axis_type, devices=None):
    """Returns a mesh with axes of one type, given as `{name: size}`."""
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(axis_type,) * len(axes),
        devices=devices,
    )
