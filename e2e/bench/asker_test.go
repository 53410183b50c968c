package main

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestAskerTellsFirstAndLastAnswer(t *testing.T) {
	const serves = 300 * time.Millisecond
	began := time.Now()
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if time.Since(began) > serves {
			panic(http.ErrAbortHandler)
		}
		fmt.Fprintln(w, "page")
	}))
	defer page.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var out bytes.Buffer
	commands := "first tcp://" + l.Addr().String() + "\nlast " + page.URL + "\n"
	if err := askFromPlace(strings.NewReader(commands), &out); err != nil {
		t.Fatal(err)
	}
	var times []time.Time
	for _, text := range strings.Fields(out.String()) {
		at, err := time.Parse(time.RFC3339Nano, text)
		if err != nil {
			t.Fatal(err)
		}
		times = append(times, at)
	}
	if len(times) != 3 {
		t.Fatalf("times %v, want that of the listener and the page's first and last", times)
	}
	end := began.Add(serves)
	if !times[1].Before(end) || times[2].Before(times[1]) || times[2].After(end.Add(askLimit)) {
		t.Errorf("first answer %s, last %s before the end", end.Sub(times[1]), end.Sub(times[2]))
	}
}

func TestOnlyNamesMeasurements(t *testing.T) {
	seen := map[string]bool{}
	for _, name := range names() {
		if seen[name] {
			t.Errorf("%s is there twice", name)
		}
		seen[name] = true
	}
	o := options{only: regexp.MustCompile("^(restarts|loader)$")}
	for name := range seen {
		if want := name == "restarts" || name == "loader"; o.wants(name) != want {
			t.Errorf("%s: wanted is %v", name, !want)
		}
	}
}
