"""Classic results of 16-bit training, reproduced on handwritten digits: `mpcore reproduce`.

Sources: Micikevicius et al., "Mixed Precision Training", ICLR 2018, for what is shown; the numbers
are our own, on the data of `mpcore.demo.digits`.
"""
