"""Stand-ins for @rules_cc and @rules_java, which Bazel 4's own toolchain files load.

Without them Bazel would download both. The rules are inside Bazel 4: the real packages only forward to them,
as these do.
"""

_RULES = {
    "cc": [
        "cc_binary",
        "cc_import",
        "cc_library",
        "cc_proto_library",
        "cc_test",
        "cc_toolchain",
        "cc_toolchain_suite",
        "objc_library",
    ],
    "java": [
        "java_binary",
        "java_import",
        "java_library",
        "java_runtime",
        "java_test",
        "java_toolchain",
    ],
}

def _native_rules_impl(repository_ctx):
    language = repository_ctx.attr.language
    repository_ctx.file("BUILD", "")
    repository_ctx.file(language + "/BUILD", "")
    repository_ctx.file(language + "/defs.bzl", "".join([
        "def {rule}(**attributes):\n    native.{rule}(**attributes)\n\n".format(rule = rule)
        for rule in _RULES[language]
    ]))

native_rules = repository_rule(
    implementation = _native_rules_impl,
    attrs = {"language": attr.string(mandatory = True, values = _RULES.keys())},
)
