"""The kinds of prunable structures, in the words of the command line."""

from __future__ import annotations

KINDS = {
    "query-head": "query heads, chosen separately in each KV group",
    "kv-group": "KV groups with their query heads; changes the shape of KV caches",
    "ffn-channel": "inner channels of feed-forward layers",
    "value-channel": "channels of the values of a head",
    "qk-pair": "channels of queries and keys: rotary pairs, or single channels without rotation",
    "expert-channel": "inner channels of the experts of a mixture",
    "conv-channel": "channels of convolutions",
    "block": "whole branches of a residual stream: an attention, a feed-forward layer; chosen by what they change",
    "expert": "experts of a mixture; lossy, the router chooses among fewer",
    "hidden": "the residual stream; lossy, norms see fewer channels",
}
LOSSY = frozenset({"expert", "hidden"})
ALIGNED = frozenset({"ffn-channel", "expert-channel", "conv-channel", "hidden", "value-channel"})
