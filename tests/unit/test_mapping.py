"""The mapping service's model and its two faces: what is read, refused, written. No Flask, no LCMAPS."""

import datetime as dt
import json
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilotbed.mapping import json_face, model, xacml
from pilotbed.mapping.model import Account, Answer, BadRequest, Subject

ALICE = "/DC=test/DC=grid/O=Gridlab/OU=People/CN=Alice Adams"
HOST = "/DC=test/DC=grid/O=Gridlab/OU=Hosts/CN=ce.grid.test"
FQANS = ("/gridlab/analysis/Role=NULL/Capability=NULL", "/gridlab/Role=production/Capability=NULL", "/gridlab")
GL001 = Account("gl001", 21001, 21000, (22000, 22001))

words = st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True)
dns = st.lists(st.tuples(words.filter(lambda word: word[0].isascii() and word[0].isalpha()),
                         st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=30)),
               min_size=1, max_size=5).map(
    lambda pairs: "".join(f"/{re.sub('[_-]', '.', key)}={value}" for key, value in pairs)
)  # fmt: skip
fqans = st.builds(
    lambda groups, role: "".join(f"/{group}" for group in groups) + (f"/Role={role}/Capability=NULL" if role else ""),
    st.lists(words, min_size=1, max_size=4), st.one_of(st.none(), words),
)  # fmt: skip
subjects = st.builds(Subject, dns, st.lists(fqans, max_size=8).map(tuple))
numbers = st.integers(0, 0xFFFFFFFE)
accounts = st.builds(
    Account, st.from_regex(r"[a-z_][a-z0-9_-]{0,31}", fullmatch=True), numbers, numbers,
    st.lists(numbers, max_size=5).map(tuple),
)  # fmt: skip
printable = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=80)


class TestModel:
    @pytest.mark.parametrize("dn", [
        "", "Alice", "CN=Alice", "/CN", "/=x", "//CN=x", "/C N=x", "/CN=x\n", "/CN=x\0", "/CN=\x7f",
        "/CN=J\u00fcrgen", "/CN=" + "x" * 2045, " /CN=x",
    ])  # fmt: skip
    def test_what_is_no_dn(self, dn: str) -> None:
        with pytest.raises(BadRequest, match="DN"):
            Subject(dn)

    @pytest.mark.parametrize("fqan", [
        "", "/", "gridlab", "/gridlab/", "//gridlab", "/grid lab", "/gridlab/Role=", "/Role=x", "/gridlab\n",
        "/gr\u00efd", "/gridlab/Capability=NULL/Role=x", "/gridlab/*", '/gridlab"', "/" + "x" * 300,
    ])  # fmt: skip
    def test_what_is_no_fqan(self, fqan: str) -> None:
        with pytest.raises(BadRequest, match="FQAN"):
            Subject(ALICE, (fqan,))

    def test_names_as_they_are_in_the_field(self) -> None:
        Subject("/DC=ch/DC=cern/OU=Organic Units/OU=Users/CN=jdoe/CN=123/CN=John Doe (test), Jr.'s", FQANS)
        for name in ("Robot\\/A", "C\\+\\+", "J\\xC3\\xBCrgen", 'a "b"', "", "\\xE8\\xAA\\x9E" * 64, "x+2.5.4.97=y"):
            Subject(f"/DC=test/1.2.840.113549.1.9.1=x/CN={name}")
        Subject(r"/C=DE/O=GermanGrid/CN=host/ce.example.org/emailAddress=a@b.de/CN=J\xC3\xBCrgen", ("/cms.gov/a_b-c",))

    def test_too_many_fqans(self) -> None:
        Subject(ALICE, ("/gridlab",) * model.MOST_FQANS)
        with pytest.raises(BadRequest, match="65 FQANs"):
            Subject(ALICE, ("/gridlab",) * (model.MOST_FQANS + 1))

    @pytest.mark.parametrize("account", [
        ("", 1, 1), ("root\n", 1, 1), ("-x", 1, 1), ("../x", 1, 1), ("a" * 40, 1, 1), ("x", -1, 1),
        ("x", 0xFFFFFFFF, 1), ("x", 1, 0xFFFFFFFF), ("x", 1, 1, (-1,)),
    ])  # fmt: skip
    def test_what_is_no_account(self, account: tuple) -> None:
        with pytest.raises(BadRequest):
            Account(*account)

    def test_every_decision_has_its_answer(self) -> None:
        assert model.decide(Subject(ALICE), GL001) == Answer(GL001)
        assert model.decide(Subject(ALICE), None).account is None
        assert ALICE in model.decide(Subject(ALICE), None).reason
        for uid in (0, 999):
            assert "system account" in model.decide(Subject(ALICE), Account("daemon", uid, 1)).reason

    def test_who_may_ask(self) -> None:
        assert model.may_ask(HOST, (HOST,))
        for other in ("", HOST + "x", HOST[:-1], HOST.upper(), ALICE):
            assert not model.may_ask(other, (HOST,))
        assert not model.may_ask("", ("",))
        assert not model.may_ask(HOST, ())


class TestJson:
    @given(subjects)
    def test_a_question_is_read_as_it_was_asked(self, subject: Subject) -> None:
        assert json_face.subject(json_face.request(subject)) == subject

    @given(st.one_of(st.builds(Answer, accounts), st.builds(Answer, st.none(), printable)))
    def test_an_answer_is_read_as_it_was_given(self, answer: Answer) -> None:
        assert json_face.answer(json_face.response(answer)) == answer

    @given(st.binary(max_size=300))
    def test_bytes_are_a_subject_or_refused(self, message: bytes) -> None:
        for read in (json_face.subject, json_face.answer):
            with pytest.raises(BadRequest):
                read(message)

    @given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner:
                        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                            ["dn", "fqans", "decision", "account", "reason", "name", "uid", "gid", "groups"]), inner)))
    def test_any_json_is_read_or_refused(self, value: object) -> None:
        for read in (json_face.subject, json_face.answer):
            try:
                read(json.dumps(value).encode())
            except BadRequest:
                continue

    @pytest.mark.parametrize(("message", "why"), [
        ('{"dn": "/CN=a", "dn": "/CN=b"}', "twice"), ('{"dn": "/CN=a", "uid": 0}', "no other keys"), ("[]", "object"),
        ('{"dn": 1}', "string"), ('{"fqans": []}', "string"), ('{"dn": "/CN=a", "fqans": "/gridlab"}', "list"),
        ('{"dn": "/CN=a", "fqans": [1]}', "string"), ("[" * 50000, "not JSON"), ("\xff", "not JSON"),
        ('{"dn": "/CN=a"}' + " " * model.LARGEST, "longer"), ("{", "not JSON"), ('{"dn": "\\ud800/CN=a"}', "DN"),
    ])  # fmt: skip
    def test_a_bad_question_is_refused_with_the_reason(self, message: str, why: str) -> None:
        with pytest.raises(BadRequest, match=why):
            json_face.subject(message.encode("latin-1"))

    @pytest.mark.parametrize("message", [
        {}, {"decision": "permit"}, {"decision": "Permit", "account": {}}, {"decision": "deny"}, {"error": "down"},
        {"decision": "permit", "account": {"name": "gl001", "uid": 21001, "gid": 21000}},
        {"decision": "permit", "account": {"name": "gl001", "uid": "21001", "gid": 21000, "groups": []}},
        {"decision": "permit", "account": {"name": "gl001", "uid": True, "gid": 21000, "groups": []}},
        {"decision": "permit", "account": {"name": "gl001", "uid": 21001.0, "gid": 21000, "groups": []}},
        {"decision": "permit", "account": {"name": "root\n", "uid": 21001, "gid": 21000, "groups": []}},
        {"decision": "permit", "account": [], "reason": "x"}, "permit", None,
    ])  # fmt: skip
    def test_answers_that_are_none(self, message: object) -> None:
        with pytest.raises(BadRequest):
            json_face.answer(json.dumps(message).encode())


# -- XACML: messages as a client of the profile writes them ------------------------------------------------------------

SOAP = "http://schemas.xmlsoap.org/soap/envelope/"
SAMLP, SAML = "urn:oasis:names:tc:SAML:2.0:protocol", "urn:oasis:names:tc:SAML:2.0:assertion"
OS2005 = ("urn:oasis:xacml:2.0:saml:protocol:schema:os", "urn:oasis:xacml:2.0:saml:assertion:schema:os")
V2 = ("urn:oasis:names:tc:xacml:2.0:profile:saml2.0:v2:schema:protocol",
      "urn:oasis:names:tc:xacml:2.0:profile:saml2.0:v2:schema:assertion")  # fmt: skip
CONTEXT = "urn:oasis:names:tc:xacml:2.0:context:schema:os"
POLICY = "urn:oasis:names:tc:xacml:2.0:policy:schema:os"
INTEROP = "http://authz-interop.org/xacml"
STRING = "http://www.w3.org/2001/XMLSchema#string"


def attribute(name: str, *values: str, kind: str = STRING) -> str:
    inner = "".join(f"<ctx:AttributeValue>{xml(value)}</ctx:AttributeValue>" for value in values)
    return f'<ctx:Attribute AttributeId="{name}" DataType="{kind}" Issuer="{HOST}">{inner}</ctx:Attribute>'


def xml(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def about(subject: Subject) -> str:
    return "".join([
        attribute(f"{INTEROP}/subject/subject-x509-id", subject.dn),
        attribute(f"{INTEROP}/subject/subject-x509-issuer", "/DC=test/CN=CA"),
        attribute(f"{INTEROP}/subject/vo", "gridlab"),
        attribute(f"{INTEROP}/subject/voms-fqan", *reversed(subject.fqans)),
        attribute(f"{INTEROP}/subject/voms-primary-fqan", subject.fqans[0]) if subject.fqans else "",
    ])  # fmt: skip


def query(
    subject: str, *, resource: str = "wn", action: str = "execute-now", profile: str = OS2005[0],
    head: str = "", prologue: str = '<?xml version="1.0" encoding="UTF-8"?>', extra: str = "",
) -> bytes:  # fmt: skip
    known = "urn:oasis:names:tc:xacml:1.0"
    resource = attribute(f"{known}:resource:resource-id", f"{INTEROP}/resource/resource-type/{resource}") + attribute(
        f"{INTEROP}/resource/dns-host-name", "wn1.grid.test")
    action = attribute(f"{known}:action:action-id", f"{INTEROP}/action/action-type/{action}")
    return f"""{prologue}
<env:Envelope xmlns:env="{SOAP}">{head}<env:Body>
 <q:XACMLAuthzDecisionQuery xmlns:q="{profile}" ID="q-1" Version="2.0" IssueInstant="2026-11-21T09:00:00Z" {extra}>
  <saml:Issuer xmlns:saml="{SAML}">{HOST}</saml:Issuer>
  <ctx:Request xmlns:ctx="{CONTEXT}">
   <ctx:Subject SubjectCategory="urn:oasis:names:tc:xacml:1.0:subject-category:access-subject">{subject}</ctx:Subject>
   <ctx:Resource>{resource}</ctx:Resource><ctx:Action>{action}</ctx:Action><ctx:Environment/>
  </ctx:Request>
 </q:XACMLAuthzDecisionQuery></env:Body></env:Envelope>""".encode()


def answered(message: bytes, answer: Answer | None) -> ET.Element:
    asked = xacml.query(message)
    names = iter(["_1", "_2"])
    now = dt.datetime(2026, 11, 21, 9, 30, tzinfo=dt.UTC)
    return ET.fromstring(xacml.response(asked, answer, "https://ce.grid.test:8443/", now, lambda: next(names)))


def decision(root: ET.Element) -> tuple[str, str, str]:
    found = [root.find(f".//{{{CONTEXT}}}{name}") for name in ("Decision", "StatusCode", "StatusMessage")]
    assert found[0] is not None and found[1] is not None
    text = found[2].text or "" if found[2] is not None else ""
    return found[0].text or "", found[1].attrib["Value"].rpartition(":")[2], text


class TestXacmlQuery:
    @given(st.builds(Subject, dns.map(str.strip), st.lists(fqans, max_size=1).map(tuple)))
    def test_a_subject_is_read_as_it_was_asked(self, subject: Subject) -> None:
        assert xacml.query(query(about(subject))).subject == subject

    def test_the_primary_fqan_comes_first_and_once(self) -> None:
        found = xacml.query(query(about(Subject(ALICE, FQANS)))).subject
        assert found == Subject(ALICE, (FQANS[0], FQANS[2], FQANS[1]))

    def test_without_a_primary_one_the_order_is_the_messages(self) -> None:
        who = attribute(f"{INTEROP}/subject/subject-x509-id", ALICE)
        who += attribute(f"{INTEROP}/subject/voms-fqan", FQANS[1]) + attribute(f"{INTEROP}/subject/voms-fqan", FQANS[0])
        assert xacml.query(query(who)).subject == Subject(ALICE, (FQANS[1], FQANS[0]))

    @pytest.mark.parametrize("namespaces", [OS2005, V2], ids=["2005", "v2"])
    def test_both_versions_of_the_profile(self, namespaces: tuple[str, str]) -> None:
        asked = xacml.query(query(about(Subject(ALICE)), profile=namespaces[0]))
        raw = xacml.response(asked, Answer(GL001), "urn:x", dt.datetime.now(dt.UTC), lambda: "_1").decode()
        assert f'xmlns:xacml-saml="{namespaces[1]}" xsi:type="xacml-saml:XACMLAuthzDecisionStatementType"' in raw

    @pytest.mark.parametrize(("who", "status", "word"), [
        ("", "missing-attribute", "subject-x509-id"),
        (attribute(f"{INTEROP}/subject/subject-x509-id", ALICE, HOST), "syntax-error", "2 values"),
        (attribute(f"{INTEROP}/subject/subject-x509-id", ALICE) * 2, "syntax-error", "2 values"),
        (attribute(f"{INTEROP}/subject/subject-x509-id", ALICE, kind="urn:x"), "missing-attribute", "no string"),
        (attribute(f"{INTEROP}/subject/subject-x509-id", "Alice"), "syntax-error", "DN"),
        (about(Subject(ALICE)) + attribute(f"{INTEROP}/subject/voms-fqan", "x"), "syntax-error", "FQAN"),
        (about(Subject(ALICE)) + attribute(f"{INTEROP}/subject/voms-primary-fqan", "/a", "/b"), "syntax-error", "2"),
        ("</ctx:Subject><ctx:Subject>", "syntax-error", "not 2"),
    ])  # fmt: skip
    def test_who_is_not_clear(self, who: str, status: str, word: str) -> None:
        asked = xacml.query(query(who))
        assert asked.subject is None
        found = decision(answered(query(who), None))
        assert found[:2] == ("Indeterminate", status)
        assert word in found[2]

    @pytest.mark.parametrize("what", [{"resource": "se"}, {"action": "access"}])
    def test_what_the_site_has_no_policy_for(self, what: dict[str, str]) -> None:
        assert decision(answered(query(about(Subject(ALICE)), **what), None))[:2] == ("NotApplicable", "ok")

    BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'

    @pytest.mark.parametrize(("message", "why"), [
        (query("", prologue=BOMB), "DTD"),
        (query("", prologue='<!DOCTYPE x SYSTEM "http://attacker.example/x.dtd">'), "DTD"),
        (query("", prologue='<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>').replace(b"wn1", b"&a;"), "DTD"),
        (query("").replace(b"wn1", b"&a;"), "not XML"),
        (query("", prologue="<?xml-stylesheet href='x'?>"), "processing"),
        (query("<x>" * 40 + "</x>" * 40), "inside each other"), (query("<x>"), "not XML"), (b"", "not XML"),
        (query("x" * model.LARGEST), "longer"), (b"<a/>", "envelope"), (query("\0"), "not XML"),
        (query("", head="<env:Header><h env:mustUnderstand='1'/></env:Header>"), "understood"),
        (query("").replace(SOAP.encode(), b"http://www.w3.org/2003/05/soap-envelope"), "SOAP 1.1"),
        (query("").replace(b"env:Body", b"env:Head"), "Body"), (query("", profile="urn:x"), "one child"),
        (query("").replace(b'ID="q-1"', b""), "no ID"), (query("").replace(b"ctx:Request", b"ctx:Other"), "Request"),
        (b'<?xml version="1.0" encoding="utf-7"?><a/>', "not XML"),
        (b'<?xml version="1.0" encoding="nonsense"?><a/>', "not XML"),
    ])  # fmt: skip
    def test_a_bad_message_is_refused_with_the_reason(self, message: bytes, why: str) -> None:
        with pytest.raises(BadRequest, match=why):
            xacml.query(message)

    @given(st.binary(max_size=200))
    def test_bytes_are_refused(self, message: bytes) -> None:
        with pytest.raises(BadRequest):
            xacml.query(message)

    @given(st.data())
    def test_any_change_of_a_query_is_read_or_refused(self, data: st.DataObject) -> None:
        message = bytearray(query(about(Subject(ALICE, FQANS))))
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(message) - 1))
            message[at : at + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
        try:
            asked = xacml.query(bytes(message))
        except BadRequest:
            return
        assert (asked.subject is None) == (asked.undecided is not None)
        answered(bytes(message), Answer(GL001) if asked.subject else None)

    def test_negative_control_the_bomb_goes_off_elsewhere(self) -> None:
        """Without our refusal expat would expand it: the protection is ours, not the parser's."""
        bomb = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><x>&b;</x>'
        assert ET.fromstring(bomb).text == "a" * 30


class TestXacmlResponse:
    def test_permit_carries_the_account_as_obligations(self) -> None:
        root = answered(query(about(Subject(ALICE, FQANS))), Answer(GL001))
        assert decision(root) == ("Permit", "ok", "")
        found = [
            (obligation.attrib["ObligationId"], obligation.attrib["FulfillOn"],
             [(part.attrib["AttributeId"], part.attrib["DataType"], part.text) for part in obligation])
            for obligation in root.iter(f"{{{POLICY}}}Obligation")
        ]  # fmt: skip
        integer = "http://www.w3.org/2001/XMLSchema#integer"
        gid = f"{INTEROP}/attribute/posix-gid"
        assert found == [
            (f"{INTEROP}/obligation/uidgid", "Permit",
             [(f"{INTEROP}/attribute/posix-uid", integer, "21001"), (gid, integer, "21000")]),
            (f"{INTEROP}/obligation/secondary-gids", "Permit", [(gid, integer, "22000"), (gid, integer, "22001")]),
            (f"{INTEROP}/obligation/username", "Permit", [(f"{INTEROP}/attribute/username", STRING, "gl001")]),
        ]  # fmt: skip

    def test_it_has_the_structure_of_saml(self) -> None:
        root = answered(query(about(Subject(ALICE))), Answer(GL001))
        response = root.find(f"{{{SOAP}}}Body/{{{SAMLP}}}Response")
        assert response is not None
        assert response.attrib == {
            "ID": "_1", "Version": "2.0", "IssueInstant": "2026-11-21T09:30:00Z", "InResponseTo": "q-1",
        }  # fmt: skip
        assert [child.tag.rpartition("}")[2] for child in response] == ["Issuer", "Status", "Assertion"]
        assert response.find(f"{{{SAML}}}Assertion/{{{SAML}}}Statement/{{{CONTEXT}}}Response/{{{CONTEXT}}}Result")

    def test_deny_has_a_reason_and_no_obligation(self) -> None:
        root = answered(query(about(Subject(ALICE))), Answer(None, "banned <&>\0"))
        assert decision(root) == ("Deny", "ok", "banned <&>?")
        assert not list(root.iter(f"{{{POLICY}}}Obligation"))

    @pytest.mark.parametrize(("extra", "times"), [("", 0), ('ReturnContext="true"', 1), ('ReturnContext="false"', 0)])
    def test_the_context_comes_back_if_wanted(self, extra: str, times: int) -> None:
        root = answered(query(about(Subject(ALICE, FQANS)), extra=extra), Answer(GL001))
        found = list(root.iter(f"{{{CONTEXT}}}Request"))
        assert len(found) == times
        assert not found or ALICE in ET.tostring(found[0], encoding="unicode")

    @given(st.text())
    def test_a_fault_is_xml_whatever_the_reason(self, reason: str) -> None:
        root = ET.fromstring(xacml.fault(reason))
        assert root.findtext(f"{{{SOAP}}}Body/{{{SOAP}}}Fault/faultcode") == "soap:Client"

    def test_what_is_sent_back_of_the_query_is_data(self) -> None:
        message = query(about(Subject(ALICE))).replace(b'ID="q-1"', b"ID='\"&gt;&lt;x/&gt;'")
        assert answered(message, Answer(GL001)).find(f".//{{{SAMLP}}}Response").attrib["InResponseTo"] == '"><x/>'
