"""The engine: LRP as a mode. One table of operations, rules, composites; roots where relevance ends; uses of weights."""
