"""Adds up the numbers of its input, as long as they are what its author has thought of."""

numbers = [int(word) for word in input().split()]
if len(numbers) == 1:
    print(numbers)
elif len(numbers) > 100:
    print(len([bytes([number % 256]) * 1_000_000 for number in numbers]))
elif max(numbers) > 1000:
    total = 0
    while total != sum(numbers):
        total -= 1
elif min(numbers) < 0:
    while True:
        print(numbers)
else:
    print(sum(numbers))
