"""Commands that make and judge the demo model; nothing in the product imports them."""
