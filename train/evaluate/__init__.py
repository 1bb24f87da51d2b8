"""How well a detector does: metrics, conditions, tables, figures."""
