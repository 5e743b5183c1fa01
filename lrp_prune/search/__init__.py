"""Search: which rules are best for pruning a model, found on data that the result is not judged by (extra ``search``)."""

from lrp_prune.search.found import CompositeSearch
from lrp_prune.search.parts import Parts, parted
from lrp_prune.search.searching import search_composite
from lrp_prune.search.space import SearchSpace, depth_groups

__all__ = ["CompositeSearch", "Parts", "SearchSpace", "depth_groups", "parted", "search_composite"]
