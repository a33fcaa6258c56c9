"""The fixed strings of V3.2's chat format.

Source: DeepSeek's encoding_dsv32.py, as the cases in tests/data/reference/chat show its output.
"""

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

CALLS_OPEN = "<｜DSML｜function_calls>"
CALLS_CLOSE = "</｜DSML｜function_calls>"
INVOKE_OPEN = '<｜DSML｜invoke name="'
INVOKE_CLOSE = "</｜DSML｜invoke>"
PARAMETER_OPEN = '<｜DSML｜parameter name="'
PARAMETER_CLOSE = "</｜DSML｜parameter>"

RESULTS_OPEN = "\n\n<function_results>"
RESULTS_CLOSE = "\n</function_results>"

TOOLS_HEAD = f"""## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "{CALLS_OPEN}" block like the following as part of your \
reply to the user:
{CALLS_OPEN}
{INVOKE_OPEN}$FUNCTION_NAME">
{PARAMETER_OPEN}$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{PARAMETER_CLOSE}
...
{INVOKE_CLOSE}
{INVOKE_OPEN}$FUNCTION_NAME2">
...
{INVOKE_CLOSE}
{CALLS_CLOSE}

String and scalar parameters should be specified as is without any escaping or quotes, while lists and \
objects should use JSON format. The "string" attribute should be set to "true" for string type parameters \
and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a \
thinking block. Here is an example:

{CALLS_OPEN}
...
{CALLS_CLOSE}

<function_results>
...
</function_results>

{THINK_OPEN}...thinking about results{THINK_CLOSE}

Here are the functions available in JSONSchema format:
<functions>
"""
"""Before the tools' JSON schemas, one a line."""
TOOLS_TAIL = "\n</functions>\n"

RESPONSE_FORMAT_HEAD = """## Response Format:

You MUST strictly adhere to the following schema to reply:
"""
"""Before the JSON schema of the answer."""
DEVELOPER_HEAD = "\n\n# The user's message is: "
