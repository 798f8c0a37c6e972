"""How people ask about a name of the library. {x} is the name, {s} its last part. See `language.Patterns`."""

from benchmarks.demo_model.language import Patterns

WHAT: Patterns = (
    "What does {x} do?",
    "What is {x}?",
    "What's {x} [for|good for|used for]?",
    "[Explain|Describe] {x}[.| to me.| briefly.| in one sentence.]",
    "Tell me [about|what] {x}[.|, please.]",
    "[Can|Could] you [explain|describe] {x}?",
    "What can I [do with|use|expect of] {x}[?| for?]",
    "I [saw|found|read] {x} [in some code|in a program]. What [does it do|is it]?",
    "{x}?",
    "[help|doc|docs]: {x}",
    "What is the purpose of {x}?",
    "[When|Why] [would I use|do people use|should I use] {x}?",
    "How [does|would] {x} help me?",
    "In Python, what does {x} do?",
    "What happens when I call {x}?",
    "What do the docs say about {x}?",
    "Give me a short description of {x}.",
    "I don't understand {x}. What is it there for?",
)
WHAT_NEXT: Patterns = (
    "And {x}?",
    "[And what|What] [about|of] {x}?",
    "And what does {x} do?",
    "[OK, and|And] {x}?",
    "How about {x}?",
    "Now {x}[.|, please.]",
    "And how is it with {x}?",
    "Next: {x}.",
)
ARGUMENTS: Patterns = (
    "[What|Which] arguments does {x} take?",
    "What are the [arguments|parameters] of {x}?",
    "How [do I call|is] {x}[?| called?]",
    "What is the signature of {x}?",
    "[Show|Give] me the signature of {x}.",
    "Which [parameters|arguments] [can|do] I [pass|give] to {x}?",
    "What does {x} [take|accept|expect]?",
    "[signature|arguments|args] of {x}",
    "List the [arguments|parameters] of {x}.",
    "How many arguments does {x} take?",
    "What can be passed to {x}?",
    "What must I give {x} when I call it?",
)
ARGUMENTS_NEXT: Patterns = (
    "[What|Which] arguments does it take?",
    "And [what|which] [arguments|parameters]?",
    "How do I call it?",
    "And its [arguments|parameters|signature]?",
    "What [does it|do I have to] [take|pass]?",
    "What is its signature?",
    "And what does it accept?",
    "Which parameters has it?",
)
RETURNS: Patterns = (
    "What does {x} return?",
    "What is the [return value|result] of {x}?",
    "What do I get [back from|from] {x}?",
    "What comes back from {x}?",
    "Which value does {x} [return|give]?",
    "return value of {x}",
    "What [will|does] {x} give me?",
    "What kind of value does {x} return?",
    "If I call {x}, what do I get?",
)
RETURNS_NEXT: Patterns = (
    "And what does it return?",
    "What does it return?",
    "[And|So] what do I get back?",
    "And the [return value|result]?",
    "What comes back?",
    "What is returned?",
    "And what is its result?",
)
WHERE: Patterns = (
    "Which module has {s}?",
    "[What|Which] module is {s} in?",
    "Where [is|do I find|can I find] {s}?",
    "From which module [do|can] I import {s}?",
    "How do I import {s}?",
    "[Where does|Where do I get] {s}[ come from?|?]",
    "I need {s}. [Which|What] module [is it in|do I import|has it]?",
    "Name the module of {s}.",
    "What do I have to import for {s}?",
)
WHERE_NEXT: Patterns = (
    "[Which|What] module is it in?",
    "[And where|Where] is it?",
    "How do I import it?",
    "Where do I find it?",
    "And the module?",
    "What must I import for it?",
)
EXAMPLE: Patterns = (
    "[Give|Show] me an example of {x}.",
    "[Can|Could] you [show|give] me an example [of|for|with] {x}?",
    "How do I use {x}?",
    "An example of {x}[.|, please.|?]",
    "[Show|Demonstrate] how {x} works.",
    "Write [a line|some code|a small example] that uses {x}.",
    "example {x}",
    "What does a call of {x} look like?",
    "I would like to see {x} in use.",
)
EXAMPLE_NEXT: Patterns = (
    "[Give|Show] me an example.",
    "[Can|Could] you show me an example?",
    "[And an|An] example[?|, please.]",
    "How do I use it?",
    "For example?",
    "Show me how it is used.",
    "What does that look like in code?",
)
METHODS: Patterns = (
    "[List|Name|Show] [the|all] methods of {x}.",
    "[What|Which] methods does {x} have?",
    "What are the methods of {x}?",
    "[What|Which] methods [are there on|has] {x}?",
    "What can I call on [a|an object of type] {x}?",
    "methods of {x}",
    "Give me the methods of {x}[.|, please.]",
    "Which methods does a {x} object offer?",
    "Enumerate the methods of {x}.",
)
CONTENTS: Patterns = (
    "[What|Which functions] [is|are] in the {x} module?",
    "[List|Name] the [contents|names|functions] of {x}.",
    "What does the {x} module [contain|offer|have]?",
    "[What|Which] functions [are|do I find] in {x}?",
    "What is there in the module {x}?",
    "What can I import from {x}?",
    "contents of {x}",
    "Give me an overview of {x}.",
    "Which names does {x} export?",
)
FIND: Patterns = (
    "[Which|What] {kind} {does}?",
    "[Is there|Do you know] a {kind} that {does}?",
    "I [need|want|am looking for] a {kind} that {does}.",
    "[Find|Name] a {kind} that {does}.",
    "What is the {kind} called that {does}?",
    "Give me the name of a {kind} that {does}.",
    "How is the {kind} named which {does}?",
)
HOW: Patterns = (
    "How do I {do}?",
    "How can I {do}?",
    "I want to {do}. What do I call?",
    "[What can|What do|What should] I use to {do}?",
    "[Is there a way|Which {kind} do I need] to {do}?",
    "How does one {do}?",
    "What would you use to {do}?",
    "With what do I {do}?",
)
KIND: Patterns = (
    "Is {x} a function or a class?",
    "What kind of [thing|object] is {x}?",
    "Is {x} a [function|class|method|module]?",
    "[Function|Class] or [method|module]: {x}?",
    "What sort of name is {x}?",
    "Tell me whether {x} is a function, a class or a module.",
    "Would you call {x} a class or a function?",
)
HAS: Patterns = (
    "Does {x} have a [method|function] [named|called] {m}?",
    "Is there [a|any] {m} in {x}?",
    "Has {x} a {m} [method|function]?",
    "Can I call {m} on {x}?",
    "Is {m} part of {x}?",
    "Will I find {m} in {x}?",
)
UNKNOWN: Patterns = (*WHAT[:16], *ARGUMENTS[:6], *EXAMPLE[:4], *WHAT[-2:])
DESCRIBE: Patterns = (
    "Describe {x} as JSON.",
    "[Give|Show] me {x} as [a JSON object|JSON].",
    "Write a JSON object [about|for|that describes] {x}.",
    "{x} as JSON[.|, please.]",
    "Describe {x} in JSON with [the keys|keys] name, kind, module and arguments.",
    "JSON for {x}",
    "I want {x} described by a JSON object.",
    "Put what you know about {x} in JSON.",
)
