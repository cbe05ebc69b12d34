# The process that runs the program under test and then does what the tests ask of it.
import operator


def main():
    line = Line(3, 4)
    held = []

    def number_of(value):
        held.append(value)
        return {"theirs": len(held) - 1}

    def object_of(value):
        (name, inner), = value.items()
        return held[inner] if name == "yours" else ask_back(inner)

    def ask_back(number):
        def call(*arguments):
            line.send({"call_back": number, "arguments": packed(list(arguments), number_of)})
            return unpacked(line.receive(), object_of)
        return call

    names = {}
    with open("program.py", "rb") as file:
        program = compile(file.read(), "program.py", "exec")
    exec(program, names)
    do = {**vars(operator), **vars(builtins), "global": names.__getitem__,
          "call": lambda function, arguments, named: function(*arguments, **named)}
    line.send(sorted(name for name in names if name != "__builtins__"))
    while True:
        message = line.receive()
        arguments = unpacked(message["arguments"], object_of)
        before = [json.dumps(packed(each, number_of)) for each in changeable(message["do"], arguments)]
        try:
            answer = {"value": packed(do[message["do"]](*arguments), number_of)}
        except Exception as error:
            known = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            answer = {"error": known[0], "text": str(error)}
        after = [packed(each, number_of) for each in changeable(message["do"], arguments)]
        answer["changed"] = {str(i): now for i, now in enumerate(after) if json.dumps(now) != before[i]}
        line.send(answer)


main()
