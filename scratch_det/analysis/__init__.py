"""How large a recipe's model is and what it costs, part by part."""
