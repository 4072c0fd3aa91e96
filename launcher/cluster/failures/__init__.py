"""What failed first: records of failures and of ranks that hang, and the sentence made of them.

position   where a rank is in its step
flight     which collectives a rank has launched and waits for, from PyTorch's flight recorder
record     the record of a rank's failure, a file of the run's folder
explain    one sentence from the records of all ranks
report     writes this rank's record, and prints the cause once for all ranks
"""
