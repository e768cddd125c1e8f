"""The core nodes, for the `expand` method of your own transform: `sc.nodes.MapNode(function, (self.rate,))`.

A transform that is linear in the gradient expands to `ScaleNode` or `MeanNode`, any other to `MapNode`; a transform of
losses expands to `Wrap`. Nodes are frozen values, and the set is closed: `Node` is their union.
"""

from stepc._core.nodes import (
    AlternateNode,
    DifferentiateNode,
    FollowNode,
    GuardNode,
    InScan,
    MapNode,
    MeanNode,
    Node,
    OverMesh,
    PerturbNode,
    RepeatNode,
    RescaleNode,
    ScaleNode,
    Turn,
    UnderVmap,
    UpdateNode,
    Wrap,
)

__all__ = [
    "AlternateNode",
    "DifferentiateNode",
    "FollowNode",
    "GuardNode",
    "InScan",
    "MapNode",
    "MeanNode",
    "Node",
    "OverMesh",
    "RepeatNode",
    "PerturbNode",
    "RescaleNode",
    "ScaleNode",
    "Turn",
    "UnderVmap",
    "UpdateNode",
    "Wrap",
]
