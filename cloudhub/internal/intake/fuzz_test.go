package intake

import (
	"bytes"
	"testing"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/inbox"
)

// FuzzStored: a store that was damaged, or that another version wrote, must give errors, never a crash or records of somebody
// else. What is read is written back as it stood.
func FuzzStored(f *testing.F) {
	p := place{"box-1", "s", 3}
	f.Add(p.key(keyData, 9), data{historical: true, mono: [2]int64{-1, 1}, wall: [2]int64{2, 3}, frame: []byte("frame")}.encode())
	f.Add(p.prefix(keyAccount), make([]byte, 16))
	f.Add(timeKey(5, 6, 7), clockState{-5, longshorepb.ClockQuality_CLOCK_QUALITY_SYNCED}.encode())
	f.Add([]byte("d"), []byte{1})
	f.Add([]byte("d\x00\x00"), []byte{1, 2, 3})
	var a inbox.Account
	if _, err := a.Book(1, 5); err != nil {
		f.Fatal(err)
	}
	b, err := (&account{Account: &a}).encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(p.key(keyLoss, 1), b)
	f.Fuzz(func(t *testing.T, key, value []byte) {
		if len(key) > 0 { // every key has its kind
			if p, first, err := parseKey(key); err == nil && len(key) == len(p.key(key[0], first)) && !bytes.Equal(p.key(key[0], first), key) {
				t.Fatalf("key %q is read as %+v, %d", key, p, first)
			}
		}
		if ns, size, err := parseTimeKey(key); err == nil && len(timeKey(ns, 0, size)) != len(key) {
			t.Fatalf("key %q is read as %d, %d", key, ns, size)
		}
		if d, err := decodeData(value); err == nil {
			again, err := decodeData(d.encode())
			if err != nil || again.epoch != d.epoch || again.historical != d.historical || again.mono != d.mono || again.wall != d.wall || !bytes.Equal(again.frame, d.frame) {
				t.Fatalf("%+v is read again as %+v, %v", d, again, err)
			}
		}
		if c, err := decodeClock(value); err == nil && !bytes.Equal(c.encode(), value) {
			t.Fatalf("clock % x is read as %+v", value, c)
		}
		if a, err := decodeAccount(value); err == nil && a.Duplicates() > 1<<63 {
			t.Fatalf("account % x has fewer records than it delivered", value)
		}
	})
}
