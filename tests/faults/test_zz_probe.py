import json
from tests.faults.harness import KILLED
def kinds(bench, run):
    return [(l["event"], l.get("step"), l.get("phase")) for l in map(json.loads, bench.place.get(bench.key(run,"metrics.jsonl")).splitlines()) if l["event"]!="train_progress"]
def test_probe(bench):
    whole=bench.name("w"); bench.start(whole).ends(0)
    run=bench.name("f"); bench.start(run, hooks=[["call_before","job.record:Record.finish",1,"SIGKILL"]]).ends(KILLED)
    bench.start(run).ends(0)
    print("WHOLE", kinds(bench, whole)); print("AFTER", kinds(bench, run))
    assert kinds(bench,whole)==kinds(bench,run)
def test_plain(plain_bench):
    plain_bench.place.client.create_multipart_upload(Bucket="faults", Key="elsewhere/x")
    from tests.faults.test_store import test_a_store_without_conditional_writes as t
    t(plain_bench)
