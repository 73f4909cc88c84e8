"""What a product costs on a device: work as sympy expressions, device records, times, crossovers and short lists.

sympy takes half a second to import, so whoever needs no estimate imports nothing of this.
"""
